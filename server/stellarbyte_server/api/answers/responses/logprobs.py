"""Log-probabilities go with the text that they belong to, which calls of functions do not have."""

from collections import deque
from collections.abc import Iterable
from typing import Any


class TextLogprobs:
    """Those of the text before the first call. It is the beginning of what the model wrote."""

    def __init__(self) -> None:
        self._waiting: deque[dict[str, Any]] = deque()
        self._num_bytes = 0  # of the text, less those of the tokens that were shown with it

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        self._waiting += entries

    def take(self, text: str) -> list[dict[str, Any]]:
        """Those of the next part of the text."""
        self._num_bytes += len(text.encode())
        taken = []
        while self._waiting and self._num_bytes > 0:
            taken.append(self._waiting.popleft())
            self._num_bytes -= len(taken[-1]["bytes"])
        return taken

    def rest(self) -> list[dict[str, Any]]:
        """Those that are left at the end of an answer without calls."""
        return list(self._waiting)
