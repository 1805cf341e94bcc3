"""Assigns log-probabilities to the parts of a response's text; function calls have none."""

from collections import deque
from collections.abc import Iterable
from typing import Any


class TextLogprobs:
    """The log-probabilities of the text before the first call, with which the model's output begins."""

    def __init__(self) -> None:
        self._waiting: deque[dict[str, Any]] = deque()
        self._num_bytes = 0  # of the text, minus those of the tokens taken

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        self._waiting += entries

    def take(self, text: str) -> list[dict[str, Any]]:
        """The log-probabilities of the next part of the text."""
        self._num_bytes += len(text.encode())
        taken = []
        while self._waiting and self._num_bytes > 0:
            taken.append(self._waiting.popleft())
            self._num_bytes -= len(taken[-1]["bytes"])
        return taken

    def rest(self) -> list[dict[str, Any]]:
        """The remaining log-probabilities at the end of an answer without calls."""
        return list(self._waiting)
