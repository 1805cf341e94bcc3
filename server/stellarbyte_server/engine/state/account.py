"""Whose requests the engine works on: one account for each API key, and one for all requests without a key."""

import math
from dataclasses import dataclass

MINUTE_S = 60.0


class TokenBucket:
    """Tokens that may be used now, of so many a minute: it holds a minute's worth and fills evenly.

    Prompts are taken when their requests are queued, tokens of answers as they are generated. A step takes what it has
    computed, so the level may fall a little below 0.
    """

    def __init__(self, tokens_per_minute: int) -> None:
        self.tokens_per_minute = tokens_per_minute
        self._level = float(tokens_per_minute)
        self._at_s: float | None = None  # when the level was right; None: it is full

    def available(self, now_s: float) -> float:
        """The level at `now_s`, by a monotonic clock."""
        if self._at_s is not None:
            filled = max(0.0, now_s - self._at_s) * self.tokens_per_minute / MINUTE_S
            self._level = min(float(self.tokens_per_minute), self._level + filled)
        self._at_s = now_s
        return self._level

    def take(self, num_tokens: int, now_s: float) -> None:
        self._level = self.available(now_s) - num_tokens

    def give_back(self, num_tokens: int) -> None:
        """Undo `take`."""
        self._level += num_tokens

    def seconds_until(self, num_tokens: int, now_s: float) -> float:
        """How long until `num_tokens`, at most a minute's worth, are available if nothing is taken meanwhile."""
        return max(0.0, num_tokens - self.available(now_s)) * MINUTE_S / self.tokens_per_minute


@dataclass(eq=False, slots=True)
class Account:
    """What one key has in the scheduler. Engine thread only."""

    name: str = ""
    bucket: TokenBucket | None = None  # None: its answers are not limited
    num_running: int = 0
    num_reserved: int = 0  # places in the queue of requests that are not ready to be queued
    turn: int = 0  # rows it has got in steps that had too few for all of its sequences: where the next one goes on
    credit: float = math.inf  # tokens that it may take beyond its part of a step (see shares)
    left_at: int = 0  # number of the last step for which it had something
