"""uvicorn's HTTP connection with bounds: how many there may be, how large a header, how long a client may take.

uvicorn's own time-out covers idle connections between requests only, and its parser has no limits. The body of a
request that is being answered has its bounds in `api/middleware.py`. Knows nothing of routes.

Of what a client does not read, asyncio keeps 64 KiB and then lets the answer wait; what the kernel keeps is set where
the server's sockets are made.
"""

import asyncio
import logging
import resource
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.api.errors import ApiError, bad_request
from server.api.rejections import reason_of_error

logger = logging.getLogger("server.access")

MAX_HEADER_BYTES = 64 * 1024  # of the request line and all fields, trailers too
MAX_HEADER_FIELDS = 200
MAX_CONNECTIONS = 8192  # of one HTTP process
OTHER_FILES = 128  # descriptors for all that is not a connection
TOO_MANY_CONNECTIONS = "too_many_connections"


@dataclass(frozen=True, kw_only=True)
class ConnectionBounds:
    """What is the same for all connections; `note_rejected` is called with one of `rejections.REASONS`."""

    receive_timeout_s: float
    send_timeout_s: float
    max_connections: int
    note_rejected: Callable[[str], None]


class HeaderTooLarge(Exception):
    """Raised in the parser's callbacks; the connection is answered and closed."""


class BoundedProtocol(HttpToolsProtocol):
    """A header, or what is left of a body after its answer, must come within the bounds' `receive_timeout_s`.

    And there must be a byte in each quarter of that. A client that has not sent a byte is left without an answer. One
    that keeps an answer waiting for `send_timeout_s` is cut off, and so is one that leaves the last bytes unread for so
    long when the connection is closed.
    """

    bounds: ClassVar[ConnectionBounds]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_in_header = False
        self._is_in_body = False
        self._header_bytes = 0  # of this request so far
        self._num_fields = 0
        self._held_bytes = 0  # that came since the parser last said what it had found: it may have to keep them
        self._is_too_large = False
        self._timer: asyncio.TimerHandle | None = None  # set while something of the client is waited for
        self._waiting_since_s = 0.0
        self._heard_at_s = 0.0
        self._cut_off: asyncio.TimerHandle | None = None  # set while the client must read

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        if len(self.connections) > self.bounds.max_connections:
            message = "The server has as many connections as it can hold; try again later."
            self._refuse(ApiError(503, message, code=TOO_MANY_CONNECTIONS, headers={"Retry-After": "1"}))
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()
        self._may_rest()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._must_read()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._may_rest()

    def timeout_keep_alive_handler(self) -> None:
        if not self.transport.is_closing():
            super().timeout_keep_alive_handler()
            self._must_read()

    def _must_read(self) -> None:
        if self._cut_off is None:
            self._cut_off = self.loop.call_later(self.bounds.send_timeout_s, self._give_up)

    def _give_up(self) -> None:
        logger.info("cut off a client that did not read for %g s", self.bounds.send_timeout_s)
        # With a reset, so that the kernel keeps nothing for it either.
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _may_rest(self) -> None:
        if self._cut_off is not None:
            self._cut_off.cancel()
            self._cut_off = None

    def data_received(self, data: bytes) -> None:
        self._heard_at_s = self.loop.time()
        self._held_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            self._stop_watching()
            return
        if self._held_bytes > MAX_HEADER_BYTES:
            self._is_too_large = True
            self.send_400_response("")
            return
        self._watch()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_header = True
        self._header_bytes = self._num_fields = self._held_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_fields += 1
        self._count(len(name) + len(value) + 4)
        if self._is_in_header:  # what follows a chunked body is no part of the request that was let through
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._held_bytes = 0
        self._is_in_header, self._is_in_body = False, True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._held_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._held_bytes = 0
        self._is_in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self._watch()

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be understood, in the one form of errors, and close."""
        del msg
        if self._is_too_large:
            message = f"The header is larger than {MAX_HEADER_BYTES} bytes or {MAX_HEADER_FIELDS} fields."
            self._refuse(ApiError(431, message, code="header_too_large"))
        else:
            self._refuse(bad_request("This is not valid HTTP/1.1."))

    def _count(self, num_bytes: int) -> None:
        self._held_bytes = 0
        self._header_bytes += num_bytes
        if self._header_bytes > MAX_HEADER_BYTES or self._num_fields > MAX_HEADER_FIELDS:
            self._is_too_large = True
            raise HeaderTooLarge

    def _refuse(self, error: ApiError) -> None:
        """Answer and close; only close when another answer is under way, or to come first."""
        self._stop_watching()
        if self.transport.is_closing():
            return
        self.bounds.note_rejected(reason_of_error(error.status, error.code))
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not (cycle.response_started or self.pipeline):
            response = error.response()
            head = [STATUS_LINE[error.status], b"connection: close\r\n"]
            head += [name + b": " + value + b"\r\n" for name, value in response.raw_headers]
            self.transport.write(b"".join([*head, b"\r\n", response.body]))
        if cycle is not None:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()

    def _waits(self) -> bool:
        """Whether it is the client's turn, and nobody else sees to it that it comes."""
        if self._is_in_header:
            return True
        if self.cycle is not None and not self.cycle.response_complete:
            return False
        return self._is_in_body or self.timeout_keep_alive_task is None

    def _watch(self) -> None:
        if not self._waits():
            self._stop_watching()
        elif self._timer is None:
            self._waiting_since_s = self._heard_at_s = self.loop.time()
            self._timer = self.loop.call_later(self.bounds.receive_timeout_s / 4, self._check_time)

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check_time(self) -> None:
        self._timer = None
        if self.transport.is_closing() or not self._waits():
            return
        now_s = self.loop.time()
        if self.flow.read_paused:  # it is us who do not read
            self._waiting_since_s = self._heard_at_s = now_s
        due_s = min(
            self._waiting_since_s + self.bounds.receive_timeout_s, self._heard_at_s + self.bounds.receive_timeout_s / 4
        )
        if now_s < due_s:
            self._timer = self.loop.call_at(due_s, self._check_time)
        elif self._is_in_header:
            message = (
                f"The header did not come within {self.bounds.receive_timeout_s:g} s, or stopped for a quarter of that."
            )
            self._refuse(ApiError(408, message, code="request_timeout"))
        else:
            self.transport.close()


def bounded_protocol(bounds: ConnectionBounds) -> type[asyncio.Protocol]:
    """The class to give to uvicorn."""
    return type("Protocol", (BoundedProtocol,), {"bounds": bounds})


def connections_allowed() -> int:
    """As many as this process may hold files open, but for some others, and MAX_CONNECTIONS at most.

    What the system lets the process open is raised first: many systems begin with 1024 and allow far more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(MAX_CONNECTIONS, soft - OTHER_FILES))
