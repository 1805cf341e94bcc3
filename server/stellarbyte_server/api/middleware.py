"""ASGI middleware of every request: ids, access log, CORS, unexpected errors, and bounds on bodies.

Each wrapper of `receive` passes disconnects on.
"""

import asyncio
import logging
import re
import secrets
import time
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stellarbyte_server.access.paths import is_anthropics, path_of
from stellarbyte_server.access.rules import RouteTable
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.rejections import rejection_reason
from stellarbyte_server.api.service import Service
from stellarbyte_server.logs import fields_of_line
from stellarbyte_server.observe.record import RequestRecord
from stellarbyte_server.observe.tracing import Tracing

logger = logging.getLogger("server.access")

UPLOAD_PATH = "/v1/files"
MAX_FORM_BYTES = 64 * 1024  # of an upload, without its file
SLOWEST_UPLOAD = 64 * 1024  # bytes per second
BODY_ERROR = "body_error"  # key in a scope's state of the ApiError for an invalid body, found while it is received
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@~-]{1,128}")


class RequestLog:
    """Gives each request an id and a record, and reports its outcome to the log, the metrics and the trace.

    See `request_id_for` for the X-Request-Id of a client.
    """

    def __init__(self, app: ASGIApp, routes: RouteTable, service: Service, tracing: Tracing | None) -> None:
        self._app = app
        self._routes = routes
        self._service = service
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(request_id=request_id_for(Headers(scope=scope)))
        state = scope.setdefault("state", {})
        state["record"] = record

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = record.request_id
                if is_anthropics(path_of(scope)):
                    headers["Request-Id"] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            reason = rejection_reason(scope, self._routes, record.status, record)
            if reason is not None:
                self._service.client.note_rejected(reason)
            _log(scope, record.status, record)
            if self._tracing is not None:
                self._tracing.note(scope, self._routes, record.status, record)


def request_id_for(headers: Headers) -> str:
    """The client's X-Request-Id if it is safe in headers, logs and shells; otherwise a new id."""
    given = headers.getlist("x-request-id")
    return given[0] if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]) else secrets.token_hex(8)


def _log(scope: Scope, status: int | None, record: RequestRecord) -> None:
    def since(start_s: float | None, end_s: float | None) -> float | None:
        return None if start_s is None or end_s is None else round(max(0.0, end_s - start_s), 4)

    key, tokens = scope["state"].get("key"), record.tokens
    log_request(
        record.request_id,
        scope["method"],
        scope["path"],
        status,
        key=None if key is None else key.name,
        adapter=record.adapter,
        prompt_tokens=None if tokens is None else tokens.prompt,
        completion_tokens=None if tokens is None else tokens.completion,
        finish_reason=record.finish_reason,
        error=record.error_code,
        queue_s=since(record.queued_s, record.started_s),
        ttft_s=since(record.arrived_s, record.first_token_s),
        total_s=since(record.arrived_s, time.monotonic()),
    )


def log_request(
    request_id: str, method: str | None, path: str | bytes | None, status: int | None, **fields: str | float | None
) -> None:
    """Write the access log's line for a request; None: the request has no such field.

    The path is given decoded and is percent-encoded here, so that no part of it looks like a field of the line.
    """
    shown_path = None if path is None else quote(path, safe="/:@!$&'()*+,;=")  # RFC 3986, 3.3
    said = {"method": method, "path": shown_path, "status": status}
    shown = ["-" if value is None else value for value in said.values()]
    logger.info("%s %s %s", *shown, extra=fields_of_line({"request_id": request_id} | said | fields, already_said=said))


class Cors(CORSMiddleware):
    """Starlette's CORS middleware; refused preflights get this API's error format."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        headers = {"Vary": response.headers["vary"]}
        error = ApiError(400, f"{bytes(response.body).decode()}; see --cors-origin.", headers=headers)
        return error.response("", None)  # a preflight belongs to neither OpenAI's nor Anthropic's API


class Unexpected:
    """Answers 500 to unexpected exceptions. Inside the middleware that adds headers to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def send_noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except Exception:
            logger.exception("request %s failed", scope["state"]["record"].request_id)
            if not has_begun:
                error = ApiError(500, "The server failed to answer this request.")
                await error.answer(scope, receive, send)


class BodyBounds:
    """Refuses compressed bodies (415), and bodies that declare or reach more than `max_bytes` (413).

    408 for bodies that do not arrive within `timeout_s`, or pause for a quarter of it; the connection is closed. File
    uploads have a separate size limit, and more time with each byte received.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_upload_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_upload_bytes = max_upload_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = scope["method"] == "POST" and path_of(scope) == UPLOAD_PATH
        max_bytes = self._max_upload_bytes if is_upload else self._max_bytes
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > max_bytes:
            await _too_large(max_bytes).answer(scope, receive, send)
            return
        coding = Headers(scope=scope).get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            await self._encoded(coding).answer(scope, receive, send)
            return
        received = 0
        is_complete = False
        loop = asyncio.get_running_loop()
        due_s = loop.time() + self._timeout_s

        async def receive_bounded() -> Message:
            nonlocal received, is_complete
            if is_complete:  # only a disconnect can follow
                return await receive()
            try:
                longer_s = received / SLOWEST_UPLOAD if is_upload else 0.0
                async with asyncio.timeout_at(min(due_s + longer_s, loop.time() + self._timeout_s / 4)):
                    message = await receive()
            except TimeoutError:
                raise self._too_slow() from None
            if (error := scope["state"].get(BODY_ERROR)) is not None:
                raise error
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                scope["state"]["record"].body_bytes = received
                if received > max_bytes:
                    raise _too_large(max_bytes)
                is_complete = not message.get("more_body", False)
            return message

        await self._app(scope, receive_bounded, send)

    def _encoded(self, coding: str) -> ApiError:
        message = f"The body's Content-Encoding {coding[:80]!r} is not supported; send it uncompressed."
        return ApiError(415, message, headers={"Accept-Encoding": "identity"})  # RFC 9110, 12.5.3

    def _too_slow(self) -> ApiError:
        message = f"The body did not arrive within {self._timeout_s:g} s, or paused for a quarter of that."
        return ApiError(408, message, code="request_timeout", headers={"Connection": "close"})


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"The body is larger than {max_bytes} bytes.", code="request_too_large")
