"""Finds what followed the newest tokens of a sequence the last time that they occurred in it."""

from array import array
from collections.abc import Sequence

import numpy as np

_MOST_ENTRIES = 1 << 14  # 64 KiB
_LEAST_ENTRIES = 1 << 8
_FEW = 32  # tokens that are added one by one
_FACTOR, _SPREAD, _WORD = 0x2C9277B5, 0x9E3779B1, 0xFFFFFFFF  # a polynomial hash, spread by Knuth's multiplier


class NgramTable:
    """The last position of each n-gram of a sequence that only grows, or is cut.

    A hash table of fixed size without chains: an n-gram may displace another, and a position is believed only if its
    tokens are the searched ones. So memory is bounded, and a token costs the same whatever came before it.
    """

    def __init__(self, length: int, num_tokens: int) -> None:
        """`length`: of the n-grams. `num_tokens`: expected length of the sequence."""
        self.length = length
        size = _LEAST_ENTRIES
        while size < min(2 * num_tokens, _MOST_ENTRIES):
            size *= 2
        self._shift = 33 - size.bit_length()
        self._positions = array("i", [-1]) * size
        self._num_added = length - 1  # n-grams that end before this position are in the table

    def extend(self, tokens: "array[int]") -> None:
        """Add the n-grams of `tokens` but the last one, which nothing follows yet."""
        self._num_added = max(self.length - 1, min(self._num_added, len(tokens)))
        count = len(tokens) - 1 - self._num_added
        if count > _FEW:
            self._extend_at_once(tokens, max(self._num_added, len(tokens) - 1 - _MOST_ENTRIES))
        elif count > 0:
            for end in range(self._num_added + 1, len(tokens)):
                self._positions[self._place(tokens, end)] = end
            self._num_added = len(tokens) - 1

    def find(self, tokens: "array[int]", ahead: Sequence[int] = ()) -> int | None:
        """The position after the last occurrence in `tokens`, but at their end, of the newest n-gram; None: none is
        known. `ahead`: guesses of the tokens that follow, which count as newest."""
        end, length = len(tokens), self.length
        if end <= length:
            return None
        newest = tokens[end - length :]
        if ahead:
            newest = (newest + array("I", ahead))[-length:]
        position = self._positions[self._place(newest, length)]
        if 0 < position < end and tokens[position - length : position] == newest:
            return position
        return None

    def _place(self, tokens: "array[int]", end: int) -> int:
        """The entry of the n-gram before `end`."""
        code = 0
        for token in tokens[end - self.length : end]:
            code = (code * _FACTOR + token + 1) & _WORD
        return ((code * _SPREAD) & _WORD) >> self._shift

    def _extend_at_once(self, tokens: "array[int]", first: int) -> None:
        """Add the n-grams that end at first + 1 to the last token but one."""
        ids = np.frombuffer(tokens, np.uint32)[first + 1 - self.length : len(tokens) - 1].astype(np.uint64)
        count = len(ids) - self.length + 1
        codes = np.zeros(count, np.uint64)
        for i in range(self.length):
            codes = (codes * np.uint64(_FACTOR) + ids[i : i + count] + np.uint64(1)) & np.uint64(_WORD)
        places = ((codes * np.uint64(_SPREAD)) & np.uint64(_WORD)) >> np.uint64(self._shift)
        positions = np.frombuffer(self._positions, np.int32)
        positions[places] = np.arange(first + 1, len(tokens), dtype=np.int32)  # of equal places the last one counts
        self._num_added = len(tokens) - 1
