"""The engine: one step after another over scheduler, model and text. Knows no sockets and no HTTP."""

from typing import Protocol

import tokenizers

from server.engine.messages import Accepted, Delta, EngineStats, News, Rejected
from server.engine.request import QUEUE_TIMEOUT, GenerationRequest
from server.engine.scheduler import Scheduler
from server.engine.sequence import Chunk, Sequence
from server.engine.text import TextStream


class Runner(Protocol):
    def run(self, chunks: list[Chunk]) -> list[int]:
        """Compute the chunks; returns the next token of each chunk that samples, in order."""
        ...


class EngineCore:
    """Requests in, text out. One thread; every call returns between two steps."""

    def __init__(
        self, scheduler: Scheduler, runner: Runner, tokenizer: tokenizers.Tokenizer, eos_token_ids: frozenset[int]
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self._live: dict[str, tuple[Sequence, TextStream]] = {}
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request.

        Raises:
            RequestRejected: it could never run to its end, or the queue is full.
        """
        sequence = self.scheduler.add(request)
        self._live[request.request_id] = sequence, TextStream(self.tokenizer, request.sampling.stop)

    def abort(self, request_id: str) -> None:
        """Drop a request and free its blocks; unknown ids are fine (it may just have ended)."""
        live = self._live.pop(request_id, None)
        if live is not None:
            self.scheduler.remove(live[0])

    def step(self) -> list[News]:
        """Advance every scheduled sequence by one forward pass.

        Says first which requests began to run and which of the others have waited too long, then what each one got.
        """
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        news: list[News] = [self._accept(sequence) for sequence in self.scheduler.admitted]
        news += [self._expire(sequence) for sequence in self.scheduler.expire()]
        sampled = self.runner.run(chunks)
        grown = self.scheduler.apply(chunks, sampled)
        self._num_steps += 1
        self._num_generated_tokens += len(grown)
        news += [self._deliver(sequence, token) for sequence, token in grown]
        return news

    def stats(self) -> EngineStats:
        pool, totals = self.scheduler.pool, self.scheduler.totals
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            kv_cache_usage=pool.num_used / pool.num_blocks,
            num_blocks_used=pool.num_used,
            prompt_tokens_total=self._num_prompt_tokens,
            generation_tokens_total=self._num_generated_tokens,
            num_preemptions_total=totals.num_preemptions,
            num_steps_total=self._num_steps,
            prefix_cache_queries_total=totals.prefix_queries,
            prefix_cache_hits_total=totals.prefix_hits,
            evicted_tokens_total=totals.evicted_tokens,
        )

    def _deliver(self, sequence: Sequence, token: int) -> Delta:
        """Turn a sampled token into text and end the request if this was its last."""
        request = sequence.request
        text_stream = self._live[request.request_id][1]
        finish_reason = None
        if token in self.eos_token_ids and not request.sampling.ignore_eos:
            text, finish_reason = text_stream.flush(), "stop"
        else:
            text, stopped = text_stream.push(token)
            if stopped:
                finish_reason = "stop"
            elif sequence.num_generated >= request.sampling.max_tokens:
                text, finish_reason = text + text_stream.flush(), "length"
        if finish_reason is None:
            return Delta(request_id=request.request_id, text=text, num_tokens=1)
        evicted_tokens = self.scheduler.evicted_tokens(sequence)
        self.abort(request.request_id)
        return Delta(
            request_id=request.request_id,
            text=text,
            num_tokens=1,
            finish_reason=finish_reason,
            cached_tokens=sequence.num_cached,
            evicted_tokens=evicted_tokens,
        )

    def _accept(self, sequence: Sequence) -> Accepted:
        self._num_prompt_tokens += sequence.num_prompt
        return Accepted(sequence.request.request_id)

    def _expire(self, sequence: Sequence) -> Rejected:
        request_id = sequence.request.request_id
        del self._live[request_id]
        message = f"The request waited for more than {self.scheduler.limits.queue_timeout_s:g} s; try again later."
        return Rejected(request_id, message, QUEUE_TIMEOUT)
