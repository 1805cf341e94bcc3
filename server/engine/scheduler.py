"""Decides what every step computes. Plain Python over counts of tokens and blocks; knows no tensors and no text.

There is no prefill or decode phase: a sequence has tokens and a count of computed ones, and a step gives it a part of
the token budget, sequences that only need their newest token first. A token is sampled when a sequence's last token
is computed.
"""

from collections import deque
from dataclasses import dataclass, field

from server.engine.block_pool import BlockPool, BlockTable, CacheLayout
from server.engine.request import GenerationRequest, RequestRejected


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    max_num_seqs: int  # running at once
    max_num_batched_tokens: int  # computed in one step
    max_model_len: int  # tokens of prompt and answer together


@dataclass(eq=False)
class Sequence:
    """One request on its way through the engine."""

    request: GenerationRequest
    table: BlockTable
    tokens: list[int] = field(init=False)  # prompt, then what was sampled
    num_computed: int = 0  # tokens whose keys are in the cache, or were and are out of sight

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)


@dataclass(frozen=True)
class Chunk:
    """Tokens start..start+length of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    length: int

    @property
    def samples(self) -> bool:
        """Whether the chunk ends at the sequence's last token, so that the step yields its next one."""
        return self.start + self.length == len(self.sequence.tokens)


class Scheduler:
    """First come, first served; when blocks run out the youngest running sequence starts again later."""

    def __init__(self, limits: SchedulerLimits, layout: CacheLayout, pool: BlockPool) -> None:
        self.limits = limits
        self.layout = layout
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: GenerationRequest) -> Sequence:
        """Queue a request.

        Raises:
            RequestRejected: it could never run to its end.
        """
        prompt, answer = len(request.prompt_token_ids), request.sampling.max_tokens
        if prompt + answer > self.limits.max_model_len:
            raise RequestRejected(
                f"The prompt has {prompt} tokens and max_tokens is {answer}; together they exceed the context of "
                f"{self.limits.max_model_len} tokens.",
                code="context_length_exceeded",
                param="max_tokens",
            )
        sequence = Sequence(request, BlockTable(self.layout))
        self.waiting.append(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or aborted, and free its blocks. Between two steps only."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.pool.give_back(sequence.table.pop_all())

    def schedule(self) -> list[Chunk]:
        """Choose the next step's chunks and reserve their blocks; [] when there is nothing to do."""
        budget = self.limits.max_num_batched_tokens
        chunks: list[Chunk] = []
        preempted: set[Sequence] = set()
        for sequence in sorted(self.running, key=lambda s: s.num_pending > 1):  # stable: oldest first within a kind
            if budget == 0:
                break
            if sequence in preempted:
                continue
            length = min(sequence.num_pending, budget)
            preempted |= self._make_room(sequence, sequence.num_computed + length)
            if sequence not in preempted:
                self._take_blocks(sequence, sequence.num_computed + length)
                chunks.append(Chunk(sequence, sequence.num_computed, length))
                budget -= length
        if preempted:
            return [chunk for chunk in chunks if chunk.sequence not in preempted]  # no room for newcomers either
        while self.waiting and budget > 0 and len(self.running) < self.limits.max_num_seqs:
            sequence = self.waiting[0]
            length = min(sequence.num_pending, budget)
            if self.pool.num_free < self.layout.peak_blocks(sequence.num_pending, length):
                break
            self.waiting.popleft()
            self.running.append(sequence)
            self._take_blocks(sequence, length)
            chunks.append(Chunk(sequence, 0, length))
            budget -= length
        return chunks

    def apply(self, chunks: list[Chunk], sampled: list[int]) -> list[tuple[Sequence, int]]:
        """Record a finished step; `sampled` has one token for each chunk that samples, in order.

        Returns the sequences that got a token, with the token. Ending them is the caller's decision (`remove`).
        """
        tokens = iter(sampled)
        grown = []
        for chunk in chunks:
            sequence = chunk.sequence
            samples = chunk.samples
            sequence.num_computed += chunk.length
            self.pool.give_back(sequence.table.pop_unseen(sequence.num_computed))
            if samples:
                token = next(tokens)
                sequence.tokens.append(token)
                grown.append((sequence, token))
        return grown

    def _make_room(self, sequence: Sequence, num_tokens: int) -> set[Sequence]:
        """Preempt the youngest until `sequence` can have its first `num_tokens`; it may itself be the youngest."""
        preempted: set[Sequence] = set()
        while sequence not in preempted and sequence.table.missing(num_tokens) > self.pool.num_free:
            youngest = self.running[-1]
            self._preempt(youngest)
            preempted.add(youngest)
        return preempted

    def _take_blocks(self, sequence: Sequence, num_tokens: int) -> None:
        blocks = self.pool.take(sequence.table.missing(num_tokens))
        assert blocks is not None, "blocks were counted before they were taken"
        sequence.table.add(blocks)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.give_back(sequence.table.pop_all())
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1
