"""Metrics that only HTTP processes can measure, sent to the engine, which sums them over processes.

So each HTTP process can report all metrics. Event loop thread only.
"""

import asyncio
from collections import Counter
from collections.abc import Callable

from stellarbyte_server.protocol.histogram import FIRST_TOKEN_S, LAG_S, Histogram
from stellarbyte_server.protocol.messages import HttpObservations

SENT_AFTER_S = 0.1  # longest delay of an observation, to send several at once


class Observer:
    """Collects observations until `send` passes them to the engine, or while there is no engine."""

    def __init__(self, send: Callable[[HttpObservations], None], can_send: Callable[[], bool]) -> None:
        self._send = send
        self._can_send = can_send
        self._first_token_s = Histogram(FIRST_TOKEN_S)
        self._stream_lag_s = Histogram(LAG_S)
        self._rejected: Counter[str] = Counter()
        self._sending: asyncio.TimerHandle | None = None

    def note_first_token(self, seconds: float) -> None:
        """Note the time from a request's arrival until its first token could be written."""
        self._first_token_s.observe(seconds)
        self._send_soon()

    def note_lag(self, seconds: float) -> None:
        """Note the time from the end of a step until its delta could be written."""
        self._stream_lag_s.observe(seconds)
        self._send_soon()

    def note_rejected(self, reason: str) -> None:
        """Count a request that got an error; `reason` is one of a fixed list, never text of the request."""
        self._rejected[reason] += 1
        self._send_soon()

    def flush(self) -> None:
        """Send all observations, if there is an engine. Call it again after a restart."""
        if self._sending is None or not self._can_send():
            return
        self._sending.cancel()
        self._sending = None
        rejected, self._rejected = dict(self._rejected), Counter()
        self._send(
            HttpObservations(
                first_token_s=self._first_token_s.take(), stream_lag_s=self._stream_lag_s.take(), rejected=rejected
            )
        )

    def _send_soon(self) -> None:
        if self._sending is None:
            self._sending = asyncio.get_running_loop().call_later(SENT_AFTER_S, self.flush)
