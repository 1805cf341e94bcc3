"""Follows a user's prediction of an answer, while the answer grows."""

from array import array
from bisect import bisect_left
from collections import defaultdict


class PredictedAnswer:
    """The place in a prediction where the answer is, and the tokens of the prediction that it had so far.

    When the answer leaves the prediction, it is expected to replace token by token, until two of its tokens in a row
    occur in the prediction again, after the last place that it agreed with.
    """

    def __init__(self, prediction: tuple[int, ...]) -> None:
        self.tokens = array("I", prediction)
        self.num_found = 0  # tokens of the prediction in the answer
        self._place = 0  # of the token expected next
        self._agreed = 0  # place after the last token that agreed
        self._follows = True  # whether the last token agreed
        self._num_read = 0  # tokens of the answer
        self._ends_of_pairs: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for end in range(2, len(prediction) + 1):
            self._ends_of_pairs[prediction[end - 2], prediction[end - 1]].append(end)

    def read(self, tokens: "array[int]", start: int) -> None:
        """Follow the tokens that an answer, which begins at `start` of `tokens`, has got since the last call."""
        for i in range(start + self._num_read, len(tokens)):
            self._read(tokens[i], tokens[i - 1] if i > start else None)
        self._num_read = len(tokens) - start

    def expected(self, count: int) -> tuple[int, ...]:
        """Up to `count` tokens that come next."""
        return tuple(self.tokens[self._place : self._place + count])

    def _read(self, token: int, before: int | None) -> None:
        if self._place < len(self.tokens) and self.tokens[self._place] == token:
            self.num_found += 1
            self._place += 1
            self._agreed, self._follows = self._place, True
            return
        end = None if before is None else self._next_end(before, token)
        if end is None:
            self._place += 1
            self._follows = False
            return
        self.num_found += 1 if self._follows else 2
        self._place = self._agreed = end
        self._follows = True

    def _next_end(self, before: int, token: int) -> int | None:
        """The first place after these two tokens that the answer has not passed."""
        ends = self._ends_of_pairs.get((before, token), [])
        least = self._agreed + (1 if self._follows else 2)
        found = bisect_left(ends, least)
        return ends[found] if found < len(ends) else None
