"""Warnings of several ranks on one screen: each once, with the rank that gave it first."""

import hashlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

from stellarbyte.train.ranks import is_distributed, rank_expected, ranks_expected


@contextmanager
def each_warning_once() -> Iterator[None]:
    """Within it, Python's warnings and log records from WARNING on are written to stderr once for all ranks.

    Alone, a process shows them as ever. Before the ranks have found each other, warnings wait.
    """
    if ranks_expected() == 1:
        yield
        return
    screen, root = _Screen(rank_expected()), logging.getLogger()
    before = root.handlers[:]
    root.handlers[:] = [screen]
    with warnings.catch_warnings():
        warnings.showwarning = screen.show_warning  # type: ignore[assignment]
        try:
            yield
        finally:
            root.handlers[:] = before
            screen.write_waiting()


class _Screen(logging.Handler):
    """What one rank shows."""

    def __init__(self, rank: int) -> None:
        super().__init__(logging.WARNING)
        self._rank = rank
        self._waiting: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._show(f"{record.levelname.lower()}: {record.getMessage()}")

    def show_warning(self, message: Any, category: type[Warning], *_: Any) -> None:
        self._show(f"{category.__name__}: {message}")

    def write_waiting(self) -> None:
        texts, self._waiting = self._waiting, []
        for text in texts:
            self._write(text)

    def _show(self, text: str) -> None:
        self._waiting.append(text)
        if is_distributed():
            self.write_waiting()

    def _write(self, text: str) -> None:
        if not is_distributed() or self._is_first(text):
            print(f"rank {self._rank}: {text}", file=sys.stderr, flush=True)  # noqa: T201

    def _is_first(self, text: str) -> bool:
        """The ranks' common store counts; no rank waits for another."""
        store = distributed.distributed_c10d._get_default_store()
        return bool(store.add(f"stellarbyte/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1)
