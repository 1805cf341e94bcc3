"""The engine: one step after another over scheduler, model and text. Knows no sockets and no HTTP."""

from typing import Protocol

import tokenizers

from server.engine.adapters import Adapters
from server.engine.messages import (
    Accepted,
    Call,
    Delta,
    EngineStats,
    LoadAdapter,
    News,
    Rejected,
    Reply,
    UnloadAdapter,
    failure,
)
from server.engine.request import QUEUE_TIMEOUT, GenerationRequest, RequestRejected
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
        self,
        scheduler: Scheduler,
        runner: Runner,
        tokenizer: tokenizers.Tokenizer,
        eos_token_ids: frozenset[int],
        adapters: Adapters,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.adapters = adapters
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self._live: dict[str, tuple[Sequence, TextStream]] = {}
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._replies: list[Reply] = []
        self._had_nothing_to_run = False  # in the last step
        self._num_reads = 0  # of adapters, when requests were last looked at

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def is_blocked(self) -> bool:
        """All there is to do waits for an adapter."""
        return self._had_nothing_to_run

    @property
    def wake_fd(self) -> int | None:
        """Becomes readable when an adapter was read or copied."""
        return self.adapters.wake_fd

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request.

        Raises:
            RequestRejected: it could never run to its end, or the queue is full.
        """
        adapter = None if request.adapter is None else self.adapters.bind(request.adapter)
        try:
            sequence = self.scheduler.add(request, adapter)
        except RequestRejected:
            if adapter is not None:
                self._replies += self.adapters.release(adapter)
            raise
        if adapter is not None:
            adapter.totals.num_requests += 1
        self._live[request.request_id] = sequence, TextStream(self.tokenizer, request.sampling.stop)

    def abort(self, request_id: str) -> None:
        """Drop a request and free its blocks; unknown ids are fine (it may just have ended)."""
        live = self._live.get(request_id)
        if live is not None:
            self.scheduler.remove(live[0])
            self._forget(live[0])

    def call(self, call: Call) -> None:
        """Do what the operator asks; the answer is among `take_replies`, now or after a later step."""
        if isinstance(call, LoadAdapter):
            refusal = self.adapters.load(call.call_id, call.name, call.path, call.in_place)
            self._replies += [] if refusal is None else [refusal]
        elif isinstance(call, UnloadAdapter):
            self._replies += self.adapters.unload(call.call_id, call.name)
        else:
            self._replies.append(self.adapters.list_all(call.call_id))

    def take_replies(self) -> list[Reply]:
        """The answers to calls since the last time; also takes note of what was read and copied meanwhile."""
        self._replies += self.adapters.collect()
        replies, self._replies = self._replies, []
        return replies

    def step(self) -> list[News]:
        """Advance every scheduled sequence by one forward pass.

        Says first which requests began to run and which of the others never will, then what each one got.
        """
        self._replies += self.adapters.collect()
        news: list[News] = self._refuse_unserviceable()
        chunks = self.scheduler.schedule()
        self._had_nothing_to_run = not chunks
        news += [self._accept(sequence) for sequence in self.scheduler.admitted]
        news += [self._expire(sequence) for sequence in self.scheduler.expire()]
        if not chunks:
            return news
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
            num_blocked=self.scheduler.num_blocked,
            prefix_cache_queries_total=totals.prefix_queries,
            prefix_cache_hits_total=totals.prefix_hits,
            evicted_tokens_total=totals.evicted_tokens,
        )

    def _deliver(self, sequence: Sequence, token: int) -> Delta:
        """Turn a sampled token into text and end the request if this was its last."""
        request = sequence.request
        if sequence.adapter is not None:
            sequence.adapter.totals.num_tokens += 1
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
        adapter_hash = "" if sequence.adapter is None else sequence.adapter.content_hash
        return Accepted(sequence.request.request_id, adapter_hash)

    def _refuse_unserviceable(self) -> list[News]:
        """End the waiting requests whose adapter turned out to be unusable, or not the version they want."""
        news: list[News] = []
        if self._num_reads == self.adapters.num_reads:
            return news
        self._num_reads = self.adapters.num_reads
        for sequence in [s for s in self.scheduler.waiting if s.adapter is not None]:
            refusal = self.adapters.refusal(sequence)
            if refusal is None:
                continue
            request_id = sequence.request.request_id
            self.abort(request_id)
            if sequence.was_admitted:  # its answer has begun
                news.append(failure(request_id, str(refusal)))
            else:
                news.append(Rejected(request_id, str(refusal), refusal.code, refusal.param))
        return news

    def _forget(self, sequence: Sequence) -> None:
        del self._live[sequence.request.request_id]
        if sequence.adapter is not None:
            self._replies += self.adapters.release(sequence.adapter)

    def _expire(self, sequence: Sequence) -> Rejected:
        request_id = sequence.request.request_id
        self._forget(sequence)
        message = f"The request waited for more than {self.scheduler.limits.queue_timeout_s:g} s; try again later."
        return Rejected(request_id, message, QUEUE_TIMEOUT)
