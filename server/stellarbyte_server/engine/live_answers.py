"""The answers of all queued and running requests: turns steps' results into deltas."""

import logging

import msgspec

from stellarbyte_server.engine.adapters.registry import Adapters
from stellarbyte_server.engine.answer import Answer
from stellarbyte_server.engine.drafts.drafts import Drafts
from stellarbyte_server.engine.faults.finite import not_finite
from stellarbyte_server.engine.faults.isolation import Fault
from stellarbyte_server.engine.run.executor import OutOfDeviceMemory
from stellarbyte_server.engine.run.step_plan import StepResult
from stellarbyte_server.engine.schedule.scheduler import Scheduler
from stellarbyte_server.engine.state.sequence import Chunk, Sequence
from stellarbyte_server.protocol.messages import FAILED, Delta, Reply, TokenLogprob, failure
from stellarbyte_server.protocol.request import GRAMMAR_REFUSED

logger = logging.getLogger("server.engine")

NO_MEMORY = "The device has too little memory for this request."
NOT_FINITE = "The model computed NaN or infinity for this request, so the answer cannot be continued."


class LiveAnswers:
    """Engine thread only."""

    def __init__(self, scheduler: Scheduler, adapters: Adapters, drafts: Drafts | None) -> None:
        self.failed: list[Delta] = []  # last deltas of requests that failed since the last step
        self.replies: list[Reply] = []  # to calls
        self.num_steps = 0
        self.num_step_tokens = 0
        self.num_generated_tokens = 0
        self._scheduler = scheduler
        self._adapters = adapters
        self._drafts = drafts
        self._live: dict[str, Answer] = {}

    def add(self, answer: Answer) -> None:
        """Add the answer of a queued request."""
        self._live[answer.sequence.request.request_id] = answer

    def sequence(self, request_id: str | None) -> Sequence | None:
        """The sequence of a request; None: unknown or ended."""
        answer = None if request_id is None else self._live.get(request_id)
        return None if answer is None else answer.sequence

    def end(self, sequence: Sequence) -> None:
        """Free a request's resources and forget it."""
        self._scheduler.remove(sequence)
        self.forget(sequence)

    def record(self, chunks: list[Chunk], result: StepResult) -> list[Delta]:
        """Record a step's results; returns the deltas."""
        for sequence in not_finite(chunks, result):
            self._fail_not_finite(sequence)
        if result.prompt_logprobs or result.pooled:
            self._note_prompts(chunks, result)
        if self._drafts is not None:
            self._drafts.note(chunks, result.tokens)
        grown = self._scheduler.apply(chunks, result.tokens)
        self.num_steps += 1
        self.num_step_tokens += sum([chunk.length for chunk in chunks])
        if result.logprobs:
            logprobs = {chunks[number].sequence: entries for number, entries in result.logprobs.items()}
            deltas = [self._deliver(sequence, tokens, logprobs.get(sequence)) for sequence, tokens in grown]
        else:
            deltas = [self._deliver(sequence, tokens) for sequence, tokens in grown]
        return [delta for delta in deltas if delta is not None]

    def _note_prompts(self, chunks: list[Chunk], result: StepResult) -> None:
        for number, (sequence, start, *_) in enumerate(chunks):
            if sequence.is_over:
                continue
            answer = self._live[sequence.request.request_id]
            if (logprobs := result.prompt_logprobs.get(number)) is not None:
                answer.add_prompt_logprobs(start, logprobs)
            if (pooled := result.pooled.get(number)) is not None:
                answer.add_pooled(start, pooled)

    def _deliver(
        self, sequence: Sequence, tokens: list[int], logprobs: list[TokenLogprob] | None = None
    ) -> Delta | None:
        """Turn a step's tokens of a sequence into a delta; ends the request after its last delta."""
        answer = self._live[sequence.request.request_id]
        try:
            if len(tokens) == 1 and logprobs is None:
                delta = answer.push(tokens[0])
            else:
                delta = answer.push_all(tokens, logprobs) if tokens else answer.end_of_prompt()
        except Exception as error:  # a fault of its text or grammar, not of other requests
            self._fail(sequence, FAILED, "the answer to request %s could not be continued; ending it", error)
            return None
        self.num_generated_tokens += delta.num_tokens
        if sequence.adapter is not None:
            for version in sequence.adapter.of_files:
                version.totals.num_tokens += delta.num_tokens
                version.own_totals.num_tokens += delta.num_tokens
        if delta.finish_reason is None:
            return delta
        if num_late := len(tokens) - delta.num_tokens:  # a draft went on after the end
            sequence.drop_last(num_late)
        evicted_tokens = self._scheduler.evicted_tokens(sequence)
        num_predicted = 0 if self._drafts is None else self._drafts.num_predicted(sequence)
        self.end(sequence)
        return msgspec.structs.replace(
            delta,
            cached_tokens=sequence.num_cached,
            adapted_tokens=_adapted_tokens(sequence),
            evicted_tokens=evicted_tokens,
            num_preemptions=sequence.num_preemptions,
            num_predicted=num_predicted,
        )

    def end_faulty(self, fault: Fault) -> None:
        """End the request that makes steps fail."""
        if isinstance(fault.error, OutOfDeviceMemory):
            self._fail(fault.chunk.sequence, NO_MEMORY, "out of memory for request %s alone; ending it")
        else:
            self._fail(fault.chunk.sequence, FAILED, "request %s makes steps fail; ending it", fault.error)

    def _fail(
        self, sequence: Sequence, message: str, log: str, error: Exception | None = None, code: str | None = None
    ) -> None:
        """End a request with an error; `log` is a format for its id. Its cached blocks are not shared."""
        request_id = sequence.request.request_id
        logger.error(log, request_id, exc_info=error)
        self._scheduler.remove(sequence, keep_content=False)
        self.forget(sequence)
        self.failed.append(failure(request_id, message, code))

    def _fail_not_finite(self, sequence: Sequence) -> None:
        """End a request without a valid token: logits are not finite, or the grammar allows no token."""
        refusal = self._live[sequence.request.request_id].grammar_error
        if refusal is None:
            self._fail(sequence, NOT_FINITE, "the logits of request %s are not finite; ending it")
        else:
            self._fail(sequence, refusal, "the grammar of request %s allows no token; ending it", code=GRAMMAR_REFUSED)

    def forget(self, sequence: Sequence) -> None:
        """Forget a request that the scheduler has removed."""
        del self._live[sequence.request.request_id]
        if self._drafts is not None:
            self._drafts.forget(sequence)
        if sequence.adapter is not None:
            self.replies += self._adapters.release(sequence.adapter)


def _adapted_tokens(sequence: Sequence) -> int | None:
    """Prompt tokens that have an activated adapter; None: the adapter is another, or there is none."""
    if sequence.adapter is None or not sequence.adapter.invocation:
        return None
    start = sequence.adapter_start
    return 0 if start is None else sequence.num_prompt - start
