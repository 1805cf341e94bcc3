"""The engine: one step after another over scheduler, model and text. Knows no sockets and no HTTP."""

from typing import Protocol

import tokenizers

from server.engine.messages import Delta, EngineStats
from server.engine.request import GenerationRequest
from server.engine.scheduler import Chunk, Scheduler, Sequence
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
            RequestRejected: it could never run to its end.
        """
        sequence = self.scheduler.add(request)
        self._live[request.request_id] = sequence, TextStream(self.tokenizer, request.sampling.stop)

    def abort(self, request_id: str) -> None:
        """Drop a request and free its blocks; unknown ids are fine (it may just have ended)."""
        live = self._live.pop(request_id, None)
        if live is not None:
            self.scheduler.remove(live[0])

    def step(self) -> list[Delta]:
        """Advance every scheduled sequence by one forward pass."""
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        sampled = self.runner.run(chunks)
        grown = self.scheduler.apply(chunks, sampled)
        self._num_steps += 1
        self._num_generated_tokens += len(grown)
        self._num_prompt_tokens += sum(len(s.request.prompt_token_ids) for s, _ in grown if s.num_generated == 1)
        return [self._deliver(sequence, token) for sequence, token in grown]

    def stats(self) -> EngineStats:
        pool = self.scheduler.pool
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            kv_cache_usage=pool.num_used / pool.num_blocks,
            num_blocks_used=pool.num_used,
            prompt_tokens_total=self._num_prompt_tokens,
            generation_tokens_total=self._num_generated_tokens,
            num_preemptions_total=self.scheduler.num_preemptions,
            num_steps_total=self._num_steps,
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
        if finish_reason is not None:
            self.abort(request.request_id)
        return Delta(request_id=request.request_id, text=text, num_tokens=1, finish_reason=finish_reason)
