"""Assigns the chunks of one step: rows first, then prompts. Decisions over counts of tokens."""

from functools import partial
from operator import attrgetter

from stellarbyte_server.engine.schedule.admission import Admission
from stellarbyte_server.engine.schedule.limits import SchedulerLimits
from stellarbyte_server.engine.schedule.shares import Part
from stellarbyte_server.engine.state.account import Account
from stellarbyte_server.engine.state.sequence import Chunk, Sequence

_rank = attrgetter("rank")
_new_chunk = partial(tuple.__new__, Chunk)  # twice as fast as Chunk(...), for every row of every step

MAX_SCORED_TOKENS = 256  # of a prompt in one step, if each needs a row of logits


class Filling:
    """One step. Reserves blocks for assigned tokens; sequences preempted for them lose their chunks."""

    def __init__(self, admission: Admission, limits: SchedulerLimits, turn: int, *, is_shared: bool = False) -> None:
        """`is_shared`: several accounts share it, or did recently. `turn` counts steps: odd halves alternate by
        step."""
        self.chunks: list[Chunk] = []
        self._admission = admission
        self._limits = limits
        self._turn = turn
        self._is_shared = is_shared
        self._of_prompts: dict[Sequence, int] = {}  # indices of the chunks of prompts

    def add_rows(self, sequences: list[Sequence], budget: int) -> int:
        """Assign one token to each sequence that needs only its newest; returns their number."""
        chunks, admission = self.chunks, self._admission
        for sequence in sequences if len(sequences) <= budget else sequences[:budget]:
            launched = sequence.num_launched
            # A sequence preempted meanwhile has no capacity.
            if launched < sequence.table.capacity or (sequence.is_running and admission.reserve(sequence, 1)):
                samples = sequence.samples
                sequence.num_launched = launched + 1
                sequence.num_tokens += samples
                chunks.append(_new_chunk((sequence, launched, 1, samples, ())))
        return len(chunks)

    def add_prompts(self, prefills: list[Sequence], newcomers_of: list[Account], budget: int) -> None:
        """Assign `budget` tokens to prompts: half in order of rank, half to the shortest first.

        So a long prompt takes at most twice as long as it would alone, and so do all short ones together.
        """
        if not budget:
            return
        by_rank = prefills
        if newcomers_of and self._admission.has_place:
            by_rank = sorted([*prefills, *(s for a in newcomers_of for s in self._admission.waiting.of(a))], key=_rank)
        short_part = (budget + self._turn % 2) // 2 if len(by_rank) > 1 else 0
        budget -= self._give(by_rank, budget - short_part)
        if budget and short_part:
            self._give(sorted(by_rank, key=_shortest), budget)

    def _give(self, sequences: list[Sequence], budget: int) -> int:
        """Assign tokens to sequences in this order; returns the number of tokens."""
        given = 0
        for sequence in sequences:
            if given == budget:
                break
            if sequence.is_running or self._admission.enter(sequence):
                given += self._add_prompt(sequence, budget - given)
        return given

    def _add_prompt(self, sequence: Sequence, budget: int) -> int:
        """Assign up to `budget` more tokens to a sequence; returns their number."""
        number = self._of_prompts.get(sequence)
        before = None if number is None else self.chunks[number]
        if before is not None and before.samples:
            return 0
        pending = sequence.num_pending
        most = min(pending, budget, self._most_at(sequence.num_launched, budget))
        if sequence.request.sampling.prompt_logprobs is not None:
            most = min(most, MAX_SCORED_TOKENS - (0 if before is None else before.length))
        length = self._admission.reserve_for_prompt(sequence, most) if most > 0 else 0
        if not length:
            return 0
        samples = length == pending and sequence.samples
        if number is None or before is None:
            self._of_prompts[sequence] = len(self.chunks)
            self.chunks.append(Chunk(sequence, sequence.num_launched, length, samples))
        else:
            self.chunks[number] = Chunk(sequence, before.start, before.length + length, samples)
        sequence.num_launched += length
        sequence.num_tokens += samples
        return length

    def _most_at(self, context: int, budget: int) -> int:
        """The most tokens of `budget` for a prompt after this much context, which makes each token more expensive.

        This bounds the step's duration, for which new requests wait. If other accounts share the step, the full cost
        counts; otherwise a prompt gets at least its part in a step with streams.
        """
        limits = self._limits
        if limits.context_like_a_token is None:
            return budget
        cost = 1 + context / limits.context_like_a_token
        if self._is_shared:
            return max(1, round(budget / cost))
        return max(int(limits.max_num_batched_tokens / cost), limits.max_prefill_tokens or 1)

    def result(self) -> list[Chunk]:
        """The chunks, without those of sequences preempted in this step."""
        if not self._admission.has_preempted:
            return self.chunks
        kept = []
        for chunk in self.chunks:
            if chunk.sequence.is_running:
                kept.append(chunk)
            else:
                chunk.sequence.num_tokens -= chunk.samples
        return kept


def with_drafts(chunks: list[Chunk], admission: Admission, limits: SchedulerLimits) -> list[Chunk]:
    """The chunks of a step, each longer by its sequence's draft, as far as the limits and the free blocks go.

    A draft preempts no sequence, and leaves a free block to each running one.
    """
    budget = limits.max_num_batched_tokens - sum([chunk.length for chunk in chunks])
    if limits.max_draft_tokens is not None:
        budget = min(budget, limits.max_draft_tokens)
    pool, num_kept = admission.pool, len(admission.running)
    extended: list[Chunk] = []
    for chunk in chunks:
        sequence, end = chunk.sequence, chunk.start + chunk.length
        if sequence.draft and chunk.samples:
            table = sequence.table
            room = table.capacity_with(max(0, pool.num_free - num_kept))
            draft = sequence.draft[: max(0, min(budget, room - end, sequence.max_launched - end))]
            blocks = pool.take(table.missing(end + len(draft)))
            assert blocks is not None, "blocks were counted before they were taken"
            if blocks:
                table.add(blocks)
            sequence.num_launched += len(draft)
            budget -= len(draft)
            chunk = chunk._replace(length=chunk.length + len(draft), draft=draft)
        extended.append(chunk)
    return extended


def _shortest(sequence: Sequence) -> tuple[int, int, tuple[float, int]]:
    """Key for "shortest first"; requests of lower priority come after all others of their account."""
    return sequence.request.priority, sequence.num_pending, sequence.rank


def rows_of_parts(decodes: list[Sequence], parts: list[Part]) -> list[Sequence]:
    """The sequences with a row in this step; if an account has too few rows, its sequences take turns."""
    of_account: dict[Account, list[Sequence]] = {part.account: [] for part in parts}
    for sequence in decodes:
        of_account[sequence.account].append(sequence)
    left_out: set[Sequence] = set()
    for part in parts:
        account, rows = part.account, of_account[part.account]
        if part.num_rows < len(rows):
            first = account.turn % len(rows)
            left_out.update((rows[first:] + rows[:first])[part.num_rows :])
            account.turn = first + part.num_rows
    return [sequence for sequence in decodes if sequence not in left_out]
