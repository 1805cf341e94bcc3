"""Accounts in the scheduler: one for each API key, and one for all requests without a key.

Each has a background account for requests that run only on what all other accounts leave.
"""

import math
from dataclasses import dataclass

MINUTE_S = 60.0


class TokenBucket:
    """A token bucket: holds at most a minute's tokens and fills evenly.

    Tokens of prompts are taken when queued, tokens of answers when generated. A step takes its tokens after computing
    them, so the level may fall slightly below 0.
    """

    def __init__(self, tokens_per_minute: int) -> None:
        self.tokens_per_minute = tokens_per_minute
        self._level = float(tokens_per_minute)
        self._at_s: float | None = None  # time of the level; None: full

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
        """Seconds until `num_tokens`, at most a minute's, are available if none are taken."""
        return max(0.0, num_tokens - self.available(now_s)) * MINUTE_S / self.tokens_per_minute


@dataclass(eq=False, slots=True)
class Account:
    """One key's state in the scheduler. Engine thread only."""

    name: str = ""
    bucket: TokenBucket | None = None  # None: no limit of tokens
    num_running: int = 0
    num_reserved: int = 0  # reserved places in the queue
    turn: int = 0  # rows assigned in steps with too few rows, where the next such step continues
    credit: float = math.inf  # tokens beyond its part of a step (see shares)
    left_at: int = 0  # number of the last step with its requests
    is_background: bool = False
    _background: "Account | None" = None

    def background(self) -> "Account":
        """The account of the same key's requests in the background; both use what the key may use."""
        if self._background is None:
            self._background = Account(self.name, is_background=True)
        self._background.bucket = self.bucket
        return self._background
