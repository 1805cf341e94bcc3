"""The drafts of one request: where they come from, and how long they are.

Lengths follow the estimated gain (`worth`). In addition a request has a credit, in steps: drafts are paid from it in
advance, accepted tokens are put into it, and each token of the answer adds a little. As it is never overdrawn, a
request loses at most what it began with and these little sums, even if every draft is wrong.
"""

from array import array

from stellarbyte_server.engine.drafts.ngrams import NgramTable
from stellarbyte_server.engine.drafts.prediction import PredictedAnswer
from stellarbyte_server.engine.drafts.worth import Acceptance

MOST_DRAFTED = 12  # tokens of a draft
MOST_FORCED = 32  # tokens that a grammar forces
LONG, SHORT = 4, 2  # tokens that must have occurred before

_FIRST_CREDIT = 0.5  # steps
_CREDIT_OF_TOKEN = 0.02
_MOST_CREDIT = 3.0
_TRIED_EVERY = 16  # tokens, while drafts are not worth their time
_EXPECTED_TOKENS = 512  # of an answer, for the size of tables


class Drafter:
    """Engine thread only."""

    def __init__(self, num_prompt: int, prediction: tuple[int, ...]) -> None:
        self._num_prompt = num_prompt
        self._predicted = PredictedAnswer(prediction) if prediction else None
        self._tables = [NgramTable(length, num_prompt + _EXPECTED_TOKENS) for length in (LONG, SHORT)]
        self._chances = {LONG: Acceptance(0.7), SHORT: Acceptance(0.4), 0: Acceptance(0.8)}  # 0: the prediction
        self._credit = _FIRST_CREDIT
        self._credited_at = num_prompt  # tokens
        self._tried_at = 0  # tokens, at the last draft
        self._source: int | None = None  # of the last draft; None: a grammar
        self._cost = 0.0  # of a token of the last draft

    def propose(self, tokens: "array[int]", token_cost: float) -> tuple[int, ...]:
        """Guesses of the tokens after `tokens`, prompt and answer; `token_cost` as of `StepCosts`."""
        self._credit = min(_MOST_CREDIT, self._credit + _CREDIT_OF_TOKEN * (len(tokens) - self._credited_at))
        self._credited_at = len(tokens)
        for table in self._tables:
            table.extend(tokens)
        affordable = int(self._credit / max(token_cost, 1e-6))
        if not affordable:
            return ()
        if self._predicted is not None:
            self._predicted.read(tokens, self._num_prompt)
        for source in (0, LONG, SHORT):
            draft = self._draft_from(source, tokens, min(affordable, MOST_DRAFTED), token_cost)
            if draft:
                self._source, self._cost, self._tried_at = source, token_cost, len(tokens)
                return draft
        return ()

    def _draft_from(self, source: int, tokens: "array[int]", most: int, token_cost: float) -> tuple[int, ...]:
        """A source's guesses, as many as are worth their time, or one to try it again."""
        length = min(most, self._chances[source].best_length(token_cost))
        if not length and self._tried_at + _TRIED_EVERY <= len(tokens):
            length = 1
        if not length:
            return ()
        if not source:
            return () if self._predicted is None else self._predicted.expected(length)
        position = self._tables[0 if source == LONG else 1].find(tokens)
        if position is None:
            return ()
        found = tokens[position : position + length]
        if len(found) < length:  # it repeats what it has just written
            found = (found * (length // len(found) + 1))[:length]
        return tuple(found)

    def begin_forced(self) -> None:
        """The next draft is a grammar's, which is always right or nearly so."""
        self._source = None

    def note(self, num_drafted: int, num_accepted: int) -> None:
        """The last draft was verified."""
        if self._source is None:
            return
        self._chances[self._source].note(num_drafted, num_accepted)
        self._credit = min(_MOST_CREDIT, self._credit + num_accepted - self._cost * num_drafted)
        if num_accepted:
            self._tried_at = -_TRIED_EVERY  # what was right once may be tried again at once

    def num_predicted(self, tokens: "array[int]") -> int:
        """Tokens of the prediction in the answer."""
        if self._predicted is None:
            return 0
        self._predicted.read(tokens, self._num_prompt)
        return self._predicted.num_found
