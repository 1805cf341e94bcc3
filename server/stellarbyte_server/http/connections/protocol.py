"""uvicorn's HTTP connection with limits of header size, time and number of connections.

uvicorn's own timeout covers only idle connections between requests, and its parser has no limits. `api/middleware.py`
limits the body of a request while it is answered. asyncio buffers 64 KiB of unread output and then pauses the answer;
the kernel's buffer is set where the server's sockets are created.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar
from urllib.parse import unquote_to_bytes

import httptools
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from stellarbyte_server.api.contract.errors import ApiError, bad_request
from stellarbyte_server.api.middleware import BODY_ERROR, log_request, request_id_for
from stellarbyte_server.http.connections.connection_limit import too_many_connections
from stellarbyte_server.http.connections.send_timeout import SendTimeout
from stellarbyte_server.http.connections.uvicorn_private import HttpToolsProtocol
from stellarbyte_server.observe.reasons import reason_of_error

MAX_HEADER_BYTES = 64 * 1024  # of the request line and all fields, trailers too
MAX_HEADER_FIELDS = 200
MAX_UNSENT_BYTES = 64 * 1024  # beyond it the answer pauses


@dataclass(frozen=True, kw_only=True)
class ConnectionBounds:
    """Limits and state of all connections; `note_rejected` is called with one of `reasons.REASONS`."""

    receive_timeout_s: float
    send_timeout_s: float
    max_connections: int
    note_rejected: Callable[[str], None]


class HeaderTooLarge(Exception):
    """Raised in the parser's callbacks; the connection is answered and closed."""


class BoundedProtocol(HttpToolsProtocol):
    """A header, or the rest of a body after its answer, must arrive within `receive_timeout_s` of the bounds, with at
    least one byte in each quarter of it. A client that has sent no byte gets no answer.

    A client that does not read waiting output for `send_timeout_s` is disconnected, also while the connection closes.
    """

    bounds: ClassVar[ConnectionBounds]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._application, self.app = self.app, self._answer
        self._is_in_header = False
        self._is_in_body = False
        self._header_bytes = 0  # of this request so far
        self._num_fields = 0
        self._held_bytes = 0  # received since the parser's last callback: it may have to keep them
        self._is_too_large = False
        self._is_refused = False  # discard further input
        self._timer: asyncio.TimerHandle | None = None  # set while waiting for the client
        self._waiting_since_s = 0.0
        self._heard_at_s = 0.0
        self._send_timeout: SendTimeout  # runs while the client must read

    def connection_made(self, transport: asyncio.Transport, tcp: asyncio.Transport | None = None) -> None:  # type: ignore[override]
        """`tcp`: the transport below TLS."""
        self._send_timeout = SendTimeout(
            transport, transport if tcp is None else tcp, timeout_s=self.bounds.send_timeout_s
        )
        transport.set_write_buffer_limits(MAX_UNSENT_BYTES)
        super().connection_made(transport)
        if len(self.connections) > self.bounds.max_connections:
            self._refuse(too_many_connections())
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()
        self._send_timeout.stop()
        self.app = self._application  # which leaves no reference to itself

    def eof_received(self) -> None:
        """Start the time limit for the output that is left: the transport closes next."""
        self._send_timeout.start()

    def shutdown(self) -> None:
        if not self.transport.is_closing():  # TLS transports must not be closed twice
            super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timeout.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._send_timeout.stop()

    def timeout_keep_alive_handler(self) -> None:
        if not self.transport.is_closing():
            self._close()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application. uvicorn closes some connections after their last byte, and those of failed requests."""
        if scope["http_version"] == "1.0":
            send = _until_closed(send)
        try:
            await self._application(scope, receive, send)
        finally:
            self.loop.call_soon(self._watch_closing)

    def _watch_closing(self) -> None:
        if self.transport.is_closing() and self in self.connections:
            self._send_timeout.start()

    def _close(self) -> None:
        """Close as soon as the client has read the rest."""
        self.transport.close()
        self._send_timeout.start()

    def data_received(self, data: bytes) -> None:
        if self._is_refused or self.transport.is_closing():
            return
        self._heard_at_s = self.loop.time()
        self._held_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
            if self._held_bytes > MAX_HEADER_BYTES:
                self._is_too_large = True
                raise HeaderTooLarge
        except (httptools.HttpParserError, HeaderTooLarge):  # the parser wraps errors of callbacks
            if self._is_too_large:
                message = f"The header must have at most {MAX_HEADER_BYTES} bytes and {MAX_HEADER_FIELDS} fields."
                self._refuse(ApiError(431, message, code="header_too_large"))
            else:
                self._refuse(bad_request("The request is not valid HTTP/1.1."))
            return
        self._watch()

    def _parse(self, data: bytes) -> None:
        """Parse received bytes; HttpParserError if they are not HTTP/1.1.

        Upgrade requests are ignored (RFC 9110, 7.8). After one the parser would treat further bytes as the other
        protocol, so a new parser gets the header without the upgrade, and then these bytes.
        """
        rest = memoryview(data)
        while True:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:
                rest = rest[upgrade.args[0] :]
            method, version = self.parser.get_method(), self.parser.get_http_version().encode()
            if method == b"CONNECT":
                raise httptools.HttpParserError("CONNECT is not supported")
            head = [b"%s %s HTTP/%s\r\n" % (method, self.url, version)]
            head += [b"%s: %s\r\n" % field for field in self.headers if field[0] != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            self.parser.feed_data(b"".join([*head, b"\r\n"]))

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
        if self._is_in_header:  # fields after a chunked body do not belong to the checked header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._held_bytes = 0
        if self.parser.should_upgrade():  # parsed again, see `_parse`
            return
        self._is_in_header, self._is_in_body = False, True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._held_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._held_bytes = 0
        if self.parser.should_upgrade():
            return
        self._is_in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _count(self, num_bytes: int) -> None:
        self._held_bytes = 0
        self._header_bytes += num_bytes
        if self._header_bytes > MAX_HEADER_BYTES or self._num_fields > MAX_HEADER_FIELDS:
            self._is_too_large = True
            raise HeaderTooLarge

    def _refuse(self, error: ApiError) -> None:
        """Discard further input and close: with this answer, or after the pending ones.

        An error in a body is passed to the application, which waits for the body and answers.
        """
        self._is_refused = True
        self._stop_watching()
        is_answered = self.cycle is None or self.cycle.response_complete
        if not is_answered:
            self.cycle.keep_alive = False
        if self._is_in_body:
            if is_answered:
                self._close()
            else:
                self.cycle.scope["state"][BODY_ERROR] = error
                self.cycle.message_event.set()
            return
        self.bounds.note_rejected(reason_of_error(error.status, error.code))
        request_id = request_id_for(Headers(raw=self.headers if self._is_in_header else []))
        method, path = None, None
        if self._is_in_header and self.url:
            method, path = self.parser.get_method().decode(), unquote_to_bytes(self.url.partition(b"?")[0])
        log_request(request_id, method, path, error.status if is_answered else None, error=error.code)
        if is_answered:
            response = error.response("" if path is None else path.decode("latin-1"), request_id)
            response.headers.update({"Connection": "close", "X-Request-Id": request_id})
            status = b"HTTP/1.1 %d %s\r\n" % (error.status, HTTPStatus(error.status).phrase.encode())
            head = [status, *(b"%s: %s\r\n" % field for field in response.raw_headers)]
            self.transport.write(b"".join([*head, b"\r\n", response.body]))
            self._close()

    def _waits(self) -> bool:
        """Whether the connection waits for the client, without another timeout."""
        if self._is_refused or self.transport.is_closing():
            return False
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
        if not self._waits():
            return
        now_s = self.loop.time()
        if self.flow.read_paused:  # reading is paused on our side
            self._waiting_since_s = self._heard_at_s = now_s
        due_s = min(
            self._waiting_since_s + self.bounds.receive_timeout_s, self._heard_at_s + self.bounds.receive_timeout_s / 4
        )
        if now_s < due_s:
            self._timer = self.loop.call_at(due_s, self._check_time)
        elif self._is_in_header:
            limit_s = self.bounds.receive_timeout_s
            message = f"The header must arrive within {limit_s:g} s, without a pause of a quarter of that."
            self._refuse(ApiError(408, message, code="request_timeout"))
        else:
            self._close()


def _until_closed(send: Send) -> Send:
    """Sends to an HTTP/1.0 client: an answer of unknown length ends with its connection (RFC 9112, 6.3), not in chunks.

    `send` is a method of uvicorn's cycle.
    """
    cycle: Any = getattr(send, "__self__")  # noqa: B009
    is_endless = False

    async def send_plain(message: Message) -> None:
        nonlocal is_endless
        if message["type"] == "http.response.start":
            headers = [(name, value) for name, value in message["headers"] if name.lower() != b"connection"]
            is_endless = all(name.lower() != b"content-length" for name, _ in headers)
            if is_endless:
                cycle.chunked_encoding, cycle.keep_alive = False, False
            message = {**message, "headers": headers}
        elif is_endless:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    return send_plain


def bounded_protocol(bounds: ConnectionBounds) -> type[BoundedProtocol]:
    """The protocol class for uvicorn."""
    return type("Protocol", (BoundedProtocol,), {"bounds": bounds})
