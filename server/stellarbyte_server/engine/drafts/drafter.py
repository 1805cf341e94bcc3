"""The drafts of one request: where they come from, and how long they are.

Lengths follow the estimated gain (`worth`). In addition a request has a credit, in steps: drafts are paid from it in
advance, accepted tokens are put into it, and each token of the answer adds a little. As it is never overdrawn, a
request loses at most what it began with and these little sums, even if every draft is wrong. Tokens that a grammar
forces after the answer so far are certain, so they are not paid.
"""

from array import array
from collections.abc import Container

from stellarbyte_server.engine.drafts.along import FORCED, DraftAlong, Drafted
from stellarbyte_server.engine.drafts.ngrams import NgramTable
from stellarbyte_server.engine.drafts.prediction import PredictedAnswer
from stellarbyte_server.engine.drafts.worth import MOST_CERTAIN, Acceptance
from stellarbyte_server.engine.state.sequence import TokenMask

MOST_DRAFTED = 12  # tokens of a draft
LONG, SHORT = 4, 2  # tokens that must have occurred before
_PREDICTED = 0  # the third source of guesses

_FIRST_CREDIT = 0.5  # steps
_CREDIT_OF_TOKEN = 0.02
_MOST_CREDIT = 3.0
_TRIED_EVERY = 16  # tokens, while drafts are not worth their time
_FIRST_GAIN = 0.5  # steps
_LEARNS_GAIN = 0.3  # share of a new draft in the average
_EXPECTED_TOKENS = 512  # of an answer, for the size of tables


class Drafter:
    """Engine thread only."""

    def __init__(self, num_prompt: int, prediction: tuple[int, ...]) -> None:
        self._num_prompt = num_prompt
        self._predicted = PredictedAnswer(prediction) if prediction else None
        self._tables = {length: NgramTable(length, num_prompt + _EXPECTED_TOKENS) for length in (LONG, SHORT)}
        self._chances = {_PREDICTED: Acceptance(0.8), LONG: Acceptance(0.7), SHORT: Acceptance(0.4)}  # best first
        self._credit = _FIRST_CREDIT
        self._credited_at = num_prompt  # tokens
        self._tried_at = 0  # tokens, at the last guess
        self._drafted: list[Drafted] = []  # the last draft
        self._paid = 0.0  # for delays of the batch
        self.gain = _FIRST_GAIN
        """Average of the steps that a draft saved, less those that it cost."""

    def propose(self, tokens: "array[int]", token_cost: float) -> tuple[int, ...]:
        """Guesses of the tokens after `tokens`, prompt and answer; `token_cost` as of `StepCosts`."""
        self._read(tokens)
        affordable = int(self._credit / max(token_cost, 1e-6))
        for source in self._chances if affordable else ():
            draft = self._draft_from(source, tokens, min(affordable, MOST_DRAFTED), token_cost)
            if draft:
                self._tried_at = len(tokens)
                self._drafted = [Drafted(source, token_cost)] * len(draft)
                return draft
        return ()

    def propose_along(
        self,
        tokens: "array[int]",
        grammar: TokenMask,
        end_token_ids: Container[int],
        token_cost: float,
        mask_cost: float,
    ) -> tuple[int, ...]:
        """The same along a grammar, up to a token that ends the answer. The grammar is left as it was.

        `mask_cost`: of one more mask, in the unit of `token_cost`.
        """
        self._read(tokens)
        draft = DraftAlong(grammar, end_token_ids, token_cost=token_cost, mask_cost=mask_cost, credit=self._credit)
        while draft.may_guess:
            self._add_guess(draft, tokens)
        draft.leave()
        self._credit -= draft.wasted
        self._drafted = draft.drafted
        return tuple(draft.tokens)

    def _read(self, tokens: "array[int]") -> None:
        """Take what was added to the answer."""
        self._drafted = []
        self._earn(len(tokens))
        for table in self._tables.values():
            table.extend(tokens)
        if self._predicted is not None:
            self._predicted.read(tokens, self._num_prompt)

    def _earn(self, num_tokens: int) -> None:
        """Add to the credit for the tokens since the last time, of so many in all."""
        earned = _CREDIT_OF_TOKEN * (num_tokens - self._credited_at)
        self._credit, self._credited_at = min(_MOST_CREDIT, self._credit + earned), num_tokens

    def can_pay(self, steps: float, num_tokens: int) -> bool:
        """Whether its credit, after so many tokens in all, is enough for that."""
        self._earn(num_tokens)
        return self._credit >= steps

    def pay(self, steps: float) -> None:
        """Pay for a delay of the batch, before or after its draft."""
        self._credit -= steps
        self._paid += steps

    def note_none(self) -> None:
        """There was no draft after the newest token."""
        self._note_gain(0.0, 0)

    def _note_gain(self, gain: float, num_forced: int) -> None:
        """The gain of a draft, and how many of its tokens were forced and right. These were not paid for, but save the
        time of waiting."""
        self.gain += _LEARNS_GAIN * (gain - self.gain)
        self._credit += min(self._paid, num_forced)
        self._paid = 0.0

    def _is_due(self, tokens: "array[int]") -> bool:
        """Whether a guess may be tried that is not likely to pay off."""
        return self._tried_at + _TRIED_EVERY <= len(tokens)

    def _draft_from(self, source: int, tokens: "array[int]", most: int, token_cost: float) -> tuple[int, ...]:
        """A source's guesses, as many as are worth their time, or one to try it again."""
        length = min(most, self._chances[source].best_length(token_cost))
        if not length and self._is_due(tokens):
            length = 1
        if not length:
            return ()
        if source == _PREDICTED:
            return () if self._predicted is None else self._predicted.expected(length)
        position = self._tables[source].find(tokens)
        if position is None:
            return ()
        found = tokens[position : position + length]
        if len(found) < length:  # it repeats what it has just written
            found = (found * (length // len(found) + 1))[:length]
        return tuple(found)

    def _add_guess(self, draft: DraftAlong, tokens: "array[int]") -> None:
        """Add the token after a draft from the first source that has one, and is worth it or to be tried again."""
        is_due = draft.chance == 1 and self._is_due(tokens)
        for source, acceptance in self._chances.items():
            chance = min(acceptance.chance, MOST_CERTAIN)
            may_add = is_due or draft.is_worth(chance)
            token = self._next(source, tokens, draft.tokens) if may_add else None
            if token is not None:
                draft.add(token, source, chance, may_try=is_due)
                self._tried_at = len(tokens)
                return
        draft.may_guess = False

    def _next(self, source: int, tokens: "array[int]", drafted: list[int]) -> int | None:
        """A source's guess of the token after a draft."""
        if source == _PREDICTED:
            expected = () if self._predicted is None else self._predicted.expected(len(drafted) + 1)
            is_so_far_right = len(expected) > len(drafted) and list(expected[:-1]) == drafted
            return expected[-1] if is_so_far_right else None
        position = self._tables[source].find(tokens, drafted[-source:])
        return None if position is None else tokens[position]

    def note(self, num_drafted: int, num_accepted: int) -> None:
        """The first tokens of the last draft were verified."""
        has_right_guess = False
        drafted = self._drafted[:num_drafted]
        num_forced = sum([source == FORCED for source, _ in drafted[:num_accepted]])
        self._note_gain(num_accepted - sum([cost or 0.0 for _, cost in drafted]), num_forced)
        for place, (source, cost) in enumerate(drafted):
            is_right = place < num_accepted
            if cost is None or (source == FORCED and is_right):
                continue  # a step costs the same without guesses
            self._credit -= cost
            if source != FORCED:
                self._credit += is_right
                has_right_guess = has_right_guess or is_right
                if place <= num_accepted:
                    self._chances[source].note(1, int(is_right))
        if has_right_guess and num_accepted == num_drafted and self._is_cut(num_drafted):
            self._credit -= 1
        self._credit = min(_MOST_CREDIT, self._credit)
        if has_right_guess:
            self._tried_at = -_TRIED_EVERY  # what was right once may be tried again at once

    def _is_cut(self, num_drafted: int) -> bool:
        """Whether tokens that are forced after the last guess had no place in the step, so that it saved none."""
        return num_drafted < len(self._drafted) and self._drafted[num_drafted].source == FORCED

    def num_predicted(self, tokens: "array[int]") -> int:
        """Tokens of the prediction in the answer."""
        if self._predicted is None:
            return 0
        self._predicted.read(tokens, self._num_prompt)
        return self._predicted.num_found
