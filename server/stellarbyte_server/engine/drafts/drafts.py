"""Drafts of all requests: proposed before a step, counted after it."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import takewhile

from stellarbyte_server.engine.drafts.along import MOST_ALONG
from stellarbyte_server.engine.drafts.drafter import MOST_DRAFTED, Drafter
from stellarbyte_server.engine.drafts.overlap import MOST_ROWS, Overlap
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
    """Engine thread only. For executors that take drafts; `runs_ahead`: and start a step before the one before is
    read."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter, *, runs_ahead: bool = False) -> None:
        self.totals = DraftTotals()
        self._clock = clock
        self._overlap = Overlap() if runs_ahead else None
        self._costs = StepCosts() if self._overlap is None else self._overlap.waited
        self._drafters: dict[Sequence, Drafter] = {}
        self._proposed_s = 0.0  # when; with steps ahead, the time of the last result
        self._is_alone = False  # the next result is of a step that was started when none ran

    def may_draft(self, running: list[Sequence], *, is_ahead: bool = False) -> bool:
        """Whether to propose drafts for the next step. With steps ahead, the one in flight must be read before that and
        the next one at once, so only if the drafts are likely to pay for it. `is_ahead`: a step is in flight."""
        if self._overlap is None:
            return True
        if len(running) > MOST_ROWS:
            return False
        decoding = [sequence for sequence in running if sequence.num_pending == 1]
        drafters = [(self._drafter_of(each), each.num_tokens) for each in decoding if _may_have_draft(each)]
        return bool(drafters) and self._overlap.waits(drafters, len(decoding), is_ahead=is_ahead)

    def propose(self, running: list[Sequence]) -> bool:
        """Give each running sequence that decodes its draft for the next step; returns whether there is any. No step is
        in flight."""
        if self._overlap is None:
            self._proposed_s = self._clock()
        self._is_alone = True
        decoding = [sequence for sequence in running if sequence.num_pending == 1]
        num_rows = max(1, len(decoding))
        has_any = False
        for sequence in decoding:
            sequence.draft = self._draft(sequence, num_rows) if _may_have_draft(sequence) else ()
            has_any = has_any or bool(sequence.draft)
        if self._overlap is not None and has_any:
            self._overlap.pay()
        return has_any

    @property
    def step_s(self) -> float:
        """Average duration of recent steps without prompts; 0: unknown."""
        return self._costs.step_s if self._overlap is None else self._overlap.step_s

    def _draft(self, sequence: Sequence, num_rows: int) -> tuple[int, ...]:
        """A draft for a step of so many sequences."""
        drafter, grammar = self._drafter_of(sequence), sequence.grammar
        token_cost = self._costs.token_cost(num_rows)
        draft: tuple[int, ...] = ()
        if grammar is None:
            draft = drafter.propose(sequence.tokens, token_cost)
            draft = tuple(takewhile(lambda token: token not in sequence.end_token_ids, draft))
        elif grammar.is_ready:
            mask_cost = self._costs.cost_of(grammar.expected_s, num_rows)
            draft = drafter.propose_along(sequence.tokens, grammar, sequence.end_token_ids, token_cost, mask_cost)
        if not draft:
            drafter.note_none()
        return draft

    def _drafter_of(self, sequence: Sequence) -> Drafter:
        drafter = self._drafters.get(sequence)
        if drafter is None:
            drafter = Drafter(sequence.num_prompt, sequence.request.prediction_token_ids)
            self._drafters[sequence] = drafter
        return drafter

    def note(self, chunks: Iterable[Chunk], sampled: Iterable[list[int]]) -> None:
        """Count a step's results, before they are in the sequences."""
        num_tokens, is_decoding, has_drafts = 0, True, False
        for (sequence, _, length, samples, draft), tokens in zip(chunks, sampled, strict=True):
            num_tokens += length
            is_decoding = is_decoding and samples and length == 1 + len(draft)
            if not draft:
                continue
            has_drafts = True
            num_accepted = sum([token == guess for token, guess in zip(tokens, draft, strict=False)])
            totals = self.totals
            totals.num_drafts += 1
            totals.num_draft_tokens += len(draft)
            totals.num_accepted_tokens += num_accepted
            for place in range(num_accepted):
                totals.accepted_by_place[place] += 1
            if (drafter := self._drafters.get(sequence)) is not None:
                drafter.note(len(draft), num_accepted)
        self._note_step(num_tokens, has_drafts=has_drafts, is_decoding=is_decoding and num_tokens > 0)

    def _note_step(self, num_tokens: int, *, has_drafts: bool, is_decoding: bool) -> None:
        """The duration of a step, which has just been read."""
        now_s = self._clock()
        seconds, is_alone, self._is_alone = now_s - self._proposed_s, self._is_alone, has_drafts
        if self._overlap is not None:
            self._proposed_s = now_s
        if not is_decoding:
            return
        if self._overlap is None:
            self._costs.note(num_tokens, seconds)
        elif has_drafts or is_alone:
            self._overlap.note_waited(num_tokens, seconds)
        else:
            self._overlap.note_ahead(num_tokens, seconds)

    def num_predicted(self, sequence: Sequence) -> int:
        """Tokens of its prediction in a sequence's answer."""
        if not sequence.request.prediction_token_ids:
            return 0
        return self._drafter_of(sequence).num_predicted(sequence.tokens)

    def forget(self, sequence: Sequence) -> None:
        """The request has ended."""
        self._drafters.pop(sequence, None)


def _may_have_draft(sequence: Sequence) -> bool:
    wants = sequence.request.speculative and sequence.samples
    return wants and sequence.num_launched + 1 < sequence.max_launched
