"""Which running sequences to preempt for another request: pure decisions over their places or blocks.

A sequence holds a place in the batch, and blocks of the cache. An account takes from an account with more, as long as
the other keeps at least as much as the first then has, so that two accounts do not take the same place from each other
repeatedly. If there is too little for that, requests take turns.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from stellarbyte_server.engine.state.account import Account
from stellarbyte_server.engine.state.sequence import Sequence

TURN_S = 10.0  # after this time of waiting, and of running, a place changes between accounts
TURN_TOKENS = 4096  # generated before a sequence of the same account may take the place
LEAST_TURN_TOKENS = 16  # generated in any turn, to be worth recomputing the prompt

Held = Callable[[Sequence], int]


class GivenUp(NamedTuple):
    """Sequences to preempt, and those of them that go to the end of the queue, as their turn is over."""

    sequences: list[Sequence]
    turns_are_over: bool = False


NOBODY = GivenUp([])


def one(sequence: Sequence) -> int:
    """The places of a running sequence."""
    del sequence
    return 1


def num_blocks(sequence: Sequence) -> int:
    """The blocks of a running sequence."""
    return len(sequence.table.sink_blocks) + len(sequence.table.blocks)


def who_gives_up(
    newcomer: Sequence, running: list[Sequence], held: Held, needed: int, missing: int, now_s: float
) -> GivenUp:
    """The sequences of `running` (in order of rank) to preempt for a newcomer that needs `needed` and lacks `missing`.

    Background sequences give up everything, and get nothing. NOBODY if the newcomer has to wait.
    """
    if newcomer.account.is_background:
        return NOBODY
    stopped: list[Sequence] = []
    for sequence in reversed(running):
        if missing <= 0:
            break
        if sequence.account.is_background:
            stopped.append(sequence)
            missing -= held(sequence)
    if missing <= 0:
        return GivenUp(stopped)
    others = [sequence for sequence in running if not sequence.account.is_background]
    given_up = _among_equals(newcomer, others, held, needed, missing, now_s)
    return GivenUp([*stopped, *given_up.sequences], given_up.turns_are_over)


def _among_equals(
    newcomer: Sequence, running: list[Sequence], held: Held, needed: int, missing: int, now_s: float
) -> GivenUp:
    """The same where nobody is in the background."""
    holdings = holdings_of(running, held)
    own = holdings.pop(newcomer.account, 0)
    left = list(running)
    stopped: list[Sequence] = []
    freed = 0
    while freed < missing and holdings:
        richest = max(holdings, key=holdings.__getitem__)
        last = next((sequence for sequence in reversed(left) if sequence.account is richest), None)
        if last is None or holdings[richest] - held(last) < own + needed:
            return _turns_over(newcomer, running, held, missing, now_s)
        left.remove(last)
        stopped.append(last)
        holdings[richest] -= held(last)
        freed += held(last)
    return GivenUp(stopped) if freed >= missing else _turns_over(newcomer, running, held, missing, now_s)


def _turns_over(newcomer: Sequence, running: list[Sequence], held: Held, missing: int, now_s: float) -> GivenUp:
    """The longest-running sequences among those whose turn is over."""
    if now_s - newcomer.queued_s < TURN_S:
        return NOBODY
    has_none = newcomer.account.num_running == 0
    over = []
    for sequence in running:
        num_generated = len(sequence.tokens) - sequence.turn_start
        if sequence.account is newcomer.account:
            is_over = num_generated >= TURN_TOKENS
        else:
            had_time = now_s - sequence.running_since_s >= TURN_S
            is_over = has_none and had_time and num_generated >= LEAST_TURN_TOKENS
        if is_over:
            over.append(sequence)
    over.sort(key=lambda sequence: sequence.running_since_s)
    stopped: list[Sequence] = []
    freed = 0
    for sequence in over:
        stopped.append(sequence)
        freed += held(sequence)
        if freed >= missing:
            return GivenUp(stopped, turns_are_over=True)
    return NOBODY


def least_entitled(running: list[Sequence]) -> Sequence:
    """The sequence to preempt when blocks run out: the last by rank of the account with most blocks.

    A background sequence, if there is one. Never the first of all, unless it is alone, so that one can always run to
    its end.
    """
    if running[-1].account.is_background or all(sequence.account is running[0].account for sequence in running):
        return running[-1]
    others = running[1:]
    holdings = holdings_of(others, num_blocks)
    holdings[running[0].account] += num_blocks(running[0])
    richest = max((sequence.account for sequence in reversed(others)), key=holdings.__getitem__)
    return next(sequence for sequence in reversed(others) if sequence.account is richest)


def holdings_of(running: list[Sequence], held: Held) -> Counter[Account]:
    holdings: Counter[Account] = Counter()
    for sequence in running:
        holdings[sequence.account] += held(sequence)
    return holdings
