"""The answer to one request: an async iterator of deltas."""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from stellarbyte_server.client.http_observations import Observer
from stellarbyte_server.protocol.messages import Delta, merged


class StreamWatch(Protocol):
    """Follows the requests of an engine as their messages arrive."""

    def note_tokens(self, request_id: str, num_tokens: int) -> None: ...

    def note_end(self, request_id: str, *, was_refused: bool) -> None:
        """The request has ended, for whatever reason; `was_refused`: before it ran."""


class DeltaStream:
    """The answer to one request: an async iterator of deltas, the last of which has a finish_reason.

    For one reading task, which must `close` it: that aborts a request that has not ended. Times are seconds of the
    machine's monotonic clock.
    """

    def __init__(self, request_id: str, arrived_s: float, observer: Observer, abort: Callable[[str], None]) -> None:
        """`abort` is called with the request's id if the stream is closed before its end."""
        self.request_id = request_id
        self.arrived_s = arrived_s  # when the client's request arrived
        self.sent_s = time.monotonic()
        self.started_s: float | None = None  # start of its first step
        self.first_token_s: float | None = None  # when it was read
        self.finish_reason: str | None = None  # "abort": closed before its end
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.accepted.add_done_callback(_retrieve)  # of several requests, some results may not be awaited
        self.adapter_hash = ""  # of its adapter; known once accepted
        self._observer = observer
        self._abort = abort
        self._unread: list[Delta] = []
        self._ended = False  # the last delta has arrived
        self._reader: asyncio.Future[None] | None = None

    def __aiter__(self) -> "DeltaStream":
        return self

    async def __anext__(self) -> Delta:
        while not self._unread:
            if self._ended:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        delta, self._unread = merged(self._unread), []
        now_s = time.monotonic()
        if self.first_token_s is None and delta.num_tokens:
            self.first_token_s = now_s
            self._observer.note_first_token(now_s - self.arrived_s)
        return delta

    def close(self) -> None:
        """Stop reading; aborts the request unless it has ended. May be called twice."""
        if not self._ended:
            self._ended = True
            self.finish_reason = "abort"
            self._abort(self.request_id)

    def add(self, delta: Delta, ended_s: float | None = None) -> None:
        """Called by the client with each delta and the end of its step."""
        if ended_s is not None:  # on arrival, not when read: the client may be slow
            self._observer.note_lag(time.monotonic() - ended_s)
        self._unread.append(delta)
        if delta.finish_reason is not None:
            self._ended = True
            self.finish_reason = delta.finish_reason
            resolve(self.accepted, None)  # an error may come before the request runs
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _retrieve(future: asyncio.Future[None]) -> None:
    """Keep asyncio from reporting an exception that is not awaited."""
    if not future.cancelled():
        future.exception()


def resolve(future: asyncio.Future[None], error: Exception | None) -> None:
    """Complete a future unless it is completed or cancelled."""
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
