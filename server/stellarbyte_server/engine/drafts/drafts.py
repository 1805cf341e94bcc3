"""Drafts of all requests: proposed before a step, counted after it."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import takewhile

from stellarbyte_server.engine.drafts.along import MOST_ALONG
from stellarbyte_server.engine.drafts.drafter import MOST_DRAFTED, Drafter
from stellarbyte_server.engine.drafts.worth import StepCosts
from stellarbyte_server.engine.state.sequence import Chunk, Sequence


@dataclass(kw_only=True)
class DraftTotals:
    """Counts since the engine's start."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_by_place: list[int] = field(default_factory=lambda: [0] * max(MOST_ALONG, MOST_DRAFTED))
    """How many drafts had their first, second, ... token accepted."""


class Drafts:
    """Engine thread only. For executors that take drafts and run no steps ahead."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.totals = DraftTotals()
        self._clock = clock
        self._costs = StepCosts()
        self._drafters: dict[Sequence, Drafter] = {}
        self._proposed_s = 0.0  # when

    def propose(self, running: list[Sequence]) -> bool:
        """Give each running sequence that decodes its draft for the next step; returns whether there is any."""
        self._proposed_s = self._clock()
        decoding = [sequence for sequence in running if sequence.num_pending == 1]
        num_rows = max(1, len(decoding))
        has_any = False
        for sequence in decoding:
            sequence.draft = ()
            if sequence.request.speculative and sequence.samples and sequence.num_launched + 1 < sequence.max_launched:
                sequence.draft = self._draft(sequence, num_rows)
                has_any = has_any or bool(sequence.draft)
        return has_any

    @property
    def step_s(self) -> float:
        """Average duration of recent steps without prompts; 0: unknown."""
        return self._costs.step_s

    def _draft(self, sequence: Sequence, num_rows: int) -> tuple[int, ...]:
        """A draft for a step of so many sequences."""
        drafter, grammar = self._drafter_of(sequence), sequence.grammar
        token_cost = self._costs.token_cost(num_rows)
        if grammar is None:
            draft = drafter.propose(sequence.tokens, token_cost)
            return tuple(takewhile(lambda token: token not in sequence.end_token_ids, draft))
        if not grammar.is_ready:
            return ()
        mask_cost = self._costs.cost_of(grammar.expected_s, num_rows)
        return drafter.propose_along(sequence.tokens, grammar, sequence.end_token_ids, token_cost, mask_cost)

    def _drafter_of(self, sequence: Sequence) -> Drafter:
        drafter = self._drafters.get(sequence)
        if drafter is None:
            drafter = Drafter(sequence.num_prompt, sequence.request.prediction_token_ids)
            self._drafters[sequence] = drafter
        return drafter

    def note(self, chunks: Iterable[Chunk], sampled: Iterable[list[int]]) -> None:
        """Count a step's results, before they are in the sequences."""
        num_tokens, is_decoding = 0, True
        for (sequence, _, length, samples, draft), tokens in zip(chunks, sampled, strict=True):
            num_tokens += length
            is_decoding = is_decoding and samples and length == 1 + len(draft)
            if not draft:
                continue
            num_accepted = sum([token == guess for token, guess in zip(tokens, draft, strict=False)])
            totals = self.totals
            totals.num_drafts += 1
            totals.num_draft_tokens += len(draft)
            totals.num_accepted_tokens += num_accepted
            for place in range(num_accepted):
                totals.accepted_by_place[place] += 1
            if (drafter := self._drafters.get(sequence)) is not None:
                drafter.note(len(draft), num_accepted)
        if is_decoding and num_tokens:
            self._costs.note(num_tokens, self._clock() - self._proposed_s)

    def num_predicted(self, sequence: Sequence) -> int:
        """Tokens of its prediction in a sequence's answer."""
        if not sequence.request.prediction_token_ids:
            return 0
        return self._drafter_of(sequence).num_predicted(sequence.tokens)

    def forget(self, sequence: Sequence) -> None:
        """The request has ended."""
        self._drafters.pop(sequence, None)
