"""The queue of waiting requests: their order and timeouts."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from itertools import zip_longest
from operator import attrgetter

from stellarbyte_server.engine.state.account import Account
from stellarbyte_server.engine.state.sequence import Sequence

AGEING_S = 10.0
_rank = attrgetter("rank")


def rank(priority: int, arrived_s: float, number: int) -> tuple[float, int]:
    """A request's place in the order of all requests, least first; `number` counts requests.

    A level of priority equals AGEING_S seconds of waiting: a request precedes those of the next lower level that
    arrived up to AGEING_S earlier, but not older ones. So requests of one priority are served in order of arrival, and
    as priorities are bounded, a request waits for newer ones of its account at most AGEING_S times the difference in
    priority.
    """
    return arrived_s + AGEING_S * priority, number


class WaitingQueue:
    """Sequences by account and rank. Those that never ran are dropped after `timeout_s` (None: never).

    In the background they wait as long as it takes.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._of_account: dict[Account, list[Sequence]] = {}
        self._never_ran: OrderedDict[Sequence, None] = OrderedDict()  # in order of arrival
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences, the first of each account before any second one."""
        queues = [list(self._of_account[account]) for account in self.accounts()]
        if len(queues) == 1:
            return iter(queues[0])
        return (sequence for row in zip_longest(*queues) for sequence in row if sequence is not None)

    def accounts(self) -> list[Account]:
        """Accounts with waiting sequences: fewest running ones first, then by the rank of their first.

        Background accounts come last.
        """
        if len(self._of_account) < 2:
            return list(self._of_account)
        return sorted(
            self._of_account,
            key=lambda account: (account.is_background, account.num_running, self._of_account[account][0].rank),
        )

    def of(self, account: Account) -> SequenceOf[Sequence]:
        """An account's sequences in order of rank."""
        return self._of_account.get(account, ())

    def add(self, sequence: Sequence) -> None:
        """Queue a new or preempted sequence."""
        insort(self._of_account.setdefault(sequence.account, []), sequence, key=_rank)
        self._size += 1
        if not (sequence.was_admitted or sequence.account.is_background):
            self._never_ran[sequence] = None

    def remove(self, sequence: Sequence) -> None:
        queue = self._of_account[sequence.account]
        del queue[bisect_left(queue, sequence.rank, key=_rank)]
        if not queue:
            del self._of_account[sequence.account]
        self._size -= 1
        self._never_ran.pop(sequence, None)

    def pop_newest(self, account: Account) -> Sequence | None:
        """Remove and return an account's last sequence by rank that never ran; None if there is none."""
        for sequence in reversed(self.of(account)):
            if not sequence.was_admitted:
                self.remove(sequence)
                return sequence
        return None

    def pop_expired(self, now_s: float) -> list[Sequence]:
        """Remove and return sequences that waited for their first step longer than the timeout."""
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
