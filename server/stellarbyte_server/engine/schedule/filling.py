"""The chunks of one step while they are given out: rows first, then prompts. Plain Python over counts of tokens."""

from functools import partial
from operator import attrgetter

from stellarbyte_server.engine.schedule.admission import Admission
from stellarbyte_server.engine.schedule.limits import SchedulerLimits
from stellarbyte_server.engine.schedule.shares import Part
from stellarbyte_server.engine.state.account import Account
from stellarbyte_server.engine.state.sequence import Chunk, Sequence

_rank = attrgetter("rank")
_new_chunk = partial(tuple.__new__, Chunk)  # half the time of Chunk(...), which every row of every step would take

MAX_SCORED_TOKENS = 256  # of a prompt in one step, where each needs a row of logits


class Filling:
    """One step. Blocks are reserved as tokens are given; what is preempted for them loses its chunk."""

    def __init__(self, admission: Admission, limits: SchedulerLimits, turn: int, *, is_shared: bool = False) -> None:
        """`is_shared`: several accounts have parts of it, or had a moment ago. `turn` counts steps.

        Where something cannot be halved, one has the larger part in every other step.
        """
        self.chunks: list[Chunk] = []
        self._admission = admission
        self._limits = limits
        self._turn = turn
        self._is_shared = is_shared
        self._of_prompts: dict[Sequence, int] = {}  # where the chunks of prompts are

    def add_rows(self, sequences: list[Sequence], budget: int) -> int:
        """Give sequences that only need their newest token that one; how many were given."""
        chunks, admission = self.chunks, self._admission
        for sequence in sequences if len(sequences) <= budget else sequences[:budget]:
            launched = sequence.num_launched
            # One that has been preempted meanwhile has no capacity left.
            if launched < sequence.table.capacity or (sequence.is_running and admission.reserve(sequence, 1)):
                samples = sequence.samples
                sequence.num_launched = launched + 1
                sequence.num_tokens += samples
                chunks.append(_new_chunk((sequence, launched, 1, samples)))
        return len(chunks)

    def add_prompts(self, prefills: list[Sequence], newcomers_of: list[Account], budget: int) -> None:
        """Give prompts `budget` tokens of the step: half in order of importance, half to the shortest first.

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
        """Give sequences tokens in this order, as long as there are any; how many they got."""
        given = 0
        for sequence in sequences:
            if given == budget:
                break
            if sequence.is_running or self._admission.enter(sequence):
                given += self._add_prompt(sequence, budget - given)
        return given

    def _add_prompt(self, sequence: Sequence, budget: int) -> int:
        """Give a sequence up to `budget` tokens of the step, beside those that it may have got; how many it got."""
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
        """Of `budget` tokens of a step, how many one prompt should have after so much context, where each costs more.

        So a step takes no longer: a request that comes meanwhile waits for its end. Where other accounts have a part of
        the step, what is costly is counted in full; otherwise a prompt has at least what it would have beside streams.
        """
        limits = self._limits
        if limits.context_like_a_token is None:
            return budget
        cost = 1 + context / limits.context_like_a_token
        if self._is_shared:
            return max(1, round(budget / cost))
        return max(int(limits.max_num_batched_tokens / cost), limits.max_prefill_tokens or 1)

    def result(self) -> list[Chunk]:
        """The chunks, without those of sequences that were preempted after they got them."""
        if not self._admission.has_preempted:
            return self.chunks
        kept = []
        for chunk in self.chunks:
            if chunk.sequence.is_running:
                kept.append(chunk)
            else:
                chunk.sequence.num_tokens -= chunk.samples
        return kept


def _shortest(sequence: Sequence) -> tuple[int, int, tuple[float, int]]:
    """Less important requests come after all others of their account, however short."""
    return sequence.request.priority, sequence.num_pending, sequence.rank


def rows_of_parts(decodes: list[Sequence], parts: list[Part]) -> list[Sequence]:
    """Those that have a row in this step: where an account has too few for all of its sequences they take turns."""
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
