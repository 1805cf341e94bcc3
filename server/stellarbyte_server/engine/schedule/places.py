"""Who stops running so that another request can: pure decisions over what running sequences hold.

What is held is a place among the sequences that run at once, or blocks of the cache. An account that has less than
another takes from it, as long as the other keeps at least as much as it gets itself: so no two take the same place from
each other again and again. Where there is too little for that, requests take turns.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from stellarbyte_server.engine.state.account import Account
from stellarbyte_server.engine.state.sequence import Sequence

TURN_S = 10.0  # who has waited for so long may take the place of another account's sequence that has run for so long
TURN_TOKENS = 4096  # generated before a sequence may have to let another one of its own account go on
LEAST_TURN_TOKENS = 16  # generated in any turn: so that something is won by it though its prompt is computed again

Held = Callable[[Sequence], int]


class GivenUp(NamedTuple):
    """Sequences to stop; those whose turns are over go to the end of the queue."""

    sequences: list[Sequence]
    turns_are_over: bool = False


NOBODY = GivenUp([])


def one(sequence: Sequence) -> int:
    """What a running sequence holds of the places."""
    del sequence
    return 1


def num_blocks(sequence: Sequence) -> int:
    """What it holds of the cache."""
    return len(sequence.table.sink_blocks) + len(sequence.table.blocks)


def who_gives_up(
    newcomer: Sequence, running: list[Sequence], held: Held, needed: int, missing: int, now_s: float
) -> GivenUp:
    """Whom to stop of `running` (most important first) for a newcomer that needs so much, of which so much is missing.

    NOBODY when it has to wait.
    """
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
    """Of those that have had a turn, the ones that have run the longest."""
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
    """Whom to stop when blocks run out: the least important one of the account that holds most of them.

    Never the most important of all, if there is another: so one always runs to its end.
    """
    if len(running) == 1 or all(sequence.account is running[0].account for sequence in running):
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
