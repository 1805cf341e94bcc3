"""The requests that do not run: in which order they will, and which have waited too long. Knows no blocks."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from operator import attrgetter

from server.engine.sequence import Sequence

AGEING_S = 10.0
_rank = attrgetter("rank")


def rank(priority: int, arrived_s: float, number: int) -> tuple[float, int]:
    """Where a request stands among all others, least first; `number` counts requests.

    A level of priority is worth AGEING_S seconds of waiting: a request goes before those of the next lower level that
    came up to AGEING_S earlier, and never before older ones. So within a priority the first to come is the first
    served, the order of two requests never changes, and while priorities are bounded nothing starves: after
    AGEING_S times the difference in priority no newcomer goes first.
    """
    return arrived_s + AGEING_S * priority, number


class WaitingQueue:
    """Sequences by rank. Those that never ran are dropped after `timeout_s` (None: never)."""

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._by_rank: list[Sequence] = []
        self._never_ran: OrderedDict[Sequence, None] = OrderedDict()  # in order of arrival

    def __len__(self) -> int:
        return len(self._by_rank)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_rank)

    @property
    def first(self) -> Sequence:
        return self._by_rank[0]

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, or one that was preempted."""
        insort(self._by_rank, sequence, key=_rank)
        if not sequence.was_admitted:
            self._never_ran[sequence] = None

    def remove(self, sequence: Sequence) -> None:
        del self._by_rank[bisect_left(self._by_rank, sequence.rank, key=_rank)]
        self._never_ran.pop(sequence, None)

    def pop_expired(self, now_s: float) -> list[Sequence]:
        """Remove and return those that have waited for their first step for longer than the time-out."""
        expired: list[Sequence] = []
        if self._timeout_s is None:
            return expired
        while self._never_ran:
            oldest = next(iter(self._never_ran))
            if now_s - oldest.arrived_s <= self._timeout_s:
                break
            self.remove(oldest)
            expired.append(oldest)
        return expired
