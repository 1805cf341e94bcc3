"""The engine process's counts for metrics of requests and steps.

Every queued request finishes, is aborted, or is rejected before it runs. Counts are of delivered tokens: each updates
one bucket of one histogram, without Prometheus objects.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from stellarbyte_server.protocol.histogram import (
    BETWEEN_TOKENS_S,
    CHOICES,
    FIRST_TOKEN_S,
    LAG_S,
    PREEMPTIONS,
    QUEUE_S,
    REQUEST_S,
    REQUEST_TOKENS,
    STEP_S,
    STEP_TOKENS,
    Histogram,
)
from stellarbyte_server.protocol.messages import Delta, EngineStats, EngineTotals, HttpObservations
from stellarbyte_server.protocol.request import GenerationRequest

# Why a request was aborted.
CLIENT_LEFT = "client_left"
HTTP_PROCESS_LOST = "http_process_lost"
REQUEST_FAILED = "failed"
ABORT_REASONS = (CLIENT_LEFT, HTTP_PROCESS_LOST, REQUEST_FAILED)
FINISH_REASONS = ("stop", "length")


@dataclass(kw_only=True, slots=True)
class _Life:
    """A request that has not ended. Times are seconds of the machine's monotonic clock."""

    arrived_s: float
    sent_s: float
    num_prompt: int
    max_tokens: int
    num_choices: int  # of the prompt, for the first of them; 0: another one
    num_generated: int = 0
    started_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0


class RequestTotals:
    """Engine thread only."""

    def __init__(self) -> None:
        self._lives: dict[str, _Life] = {}
        self._finished: Counter[str] = Counter()
        self._aborted: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._first_token_s = Histogram(FIRST_TOKEN_S)
        self._stream_lag_s = Histogram(LAG_S)
        self._between_tokens_s = Histogram(BETWEEN_TOKENS_S)
        self._request_s = Histogram(REQUEST_S)
        self._queue_s = Histogram(QUEUE_S)
        self._inference_s = Histogram(REQUEST_S)
        self._prefill_s = Histogram(REQUEST_S)
        self._decode_s = Histogram(REQUEST_S)
        self._max_tokens = Histogram(REQUEST_TOKENS)
        self._num_choices = Histogram(CHOICES)
        self._num_preemptions = Histogram(PREEMPTIONS)
        self._prompt_tokens = Histogram(REQUEST_TOKENS)
        self._generation_tokens = Histogram(REQUEST_TOKENS)
        self._step_tokens = Histogram(STEP_TOKENS)
        self._step_s = Histogram(STEP_S)

    def note_queued(self, requests: Iterable[GenerationRequest], arrived_s: float, sent_s: float) -> None:
        """Note requests that an HTTP process received at `arrived_s` and sent at `sent_s`."""
        first: _Life | None = None  # of the answers to one prompt
        for request in requests:
            life = _Life(
                arrived_s=arrived_s,
                sent_s=sent_s,
                num_prompt=len(request.prompt_token_ids),
                max_tokens=request.sampling.max_tokens,
                num_choices=0,
            )
            if first is None or request.sampling.choice == 0:
                first = life
            first.num_choices += 1
            self._lives[request.request_id] = life

    def note_started(self, request_id: str, now_s: float) -> None:
        """Note a request's first step."""
        life = self._lives[request_id]
        life.started_s = now_s
        self._queue_s.observe(max(0.0, now_s - life.sent_s))

    def note_delta(self, delta: Delta, now_s: float) -> None:
        life = self._lives[delta.request_id]
        if delta.num_tokens:
            if life.num_generated:
                self._between_tokens_s.observe(now_s - life.last_token_s)
            else:
                life.first_token_s = now_s
            life.last_token_s = now_s
            life.num_generated += delta.num_tokens
        if delta.finish_reason is None:
            return
        if delta.finish_reason == "error":
            self.note_aborted(delta.request_id, REQUEST_FAILED)
            return
        del self._lives[delta.request_id]
        self._finished[delta.finish_reason] += 1
        self._note_times(life, now_s)
        self._max_tokens.observe(life.max_tokens)
        if life.num_choices:
            self._num_choices.observe(life.num_choices)
        self._num_preemptions.observe(delta.num_preemptions)
        self._prompt_tokens.observe(life.num_prompt)
        self._generation_tokens.observe(life.num_generated)

    def _note_times(self, life: _Life, now_s: float) -> None:
        """Of a request that has been answered. One that is only a prompt has no time between tokens."""
        prompt_end_s = life.first_token_s if life.num_generated else now_s
        self._request_s.observe(max(0.0, now_s - life.arrived_s))
        self._inference_s.observe(max(0.0, now_s - life.started_s))
        self._prefill_s.observe(max(0.0, prompt_end_s - life.started_s))
        self._decode_s.observe(max(0.0, now_s - prompt_end_s))

    def note_aborted(self, request_id: str, reason: str) -> None:
        """Note a request aborted before its end; `reason` is one of ABORT_REASONS."""
        del self._lives[request_id]
        self._aborted[reason] += 1

    def note_refused(self, request_id: str) -> None:
        """Forget a rejected request; the HTTP process counts the rejection."""
        del self._lives[request_id]

    def note_step(self, seconds: float, num_tokens: int) -> None:
        """Note a step's duration and its tokens, including those of prompts and of the cache."""
        self._step_s.observe(seconds)
        self._step_tokens.observe(num_tokens)

    def add_observations(self, observations: HttpObservations) -> None:
        """Add an HTTP process's new observations; ValueError if its histograms have other bounds."""
        self._first_token_s.add(observations.first_token_s)
        self._stream_lag_s.add(observations.stream_lag_s)
        self._rejected.update(observations.rejected)

    def snapshot(self, stats: EngineStats) -> EngineTotals:
        """All totals; `stats`: the engine core's current statistics."""
        return EngineTotals(
            stats=stats,
            finished=dict.fromkeys(FINISH_REASONS, 0) | self._finished,
            aborted=dict.fromkeys(ABORT_REASONS, 0) | self._aborted,
            rejected=dict(self._rejected),
            first_token_s=self._first_token_s.snapshot(),
            stream_lag_s=self._stream_lag_s.snapshot(),
            between_tokens_s=self._between_tokens_s.snapshot(),
            request_s=self._request_s.snapshot(),
            queue_s=self._queue_s.snapshot(),
            inference_s=self._inference_s.snapshot(),
            prefill_s=self._prefill_s.snapshot(),
            decode_s=self._decode_s.snapshot(),
            max_tokens=self._max_tokens.snapshot(),
            num_choices=self._num_choices.snapshot(),
            num_preemptions=self._num_preemptions.snapshot(),
            prompt_tokens=self._prompt_tokens.snapshot(),
            generation_tokens=self._generation_tokens.snapshot(),
            step_tokens=self._step_tokens.snapshot(),
            step_s=self._step_s.snapshot(),
        )
