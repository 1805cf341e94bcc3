"""What happens around every request, as plain ASGI: its id, its line in the log, its errors, its size and time.

Nothing here wraps `receive` in a way that hides a disconnect.
"""

import asyncio
import logging
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import ApiError

logger = logging.getLogger("server.access")


class RequestLog:
    """Gives each request an id, and logs one line when it ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.perf_counter()
        request_id = secrets.token_hex(8)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            tokens = state.get("tokens")
            logger.info(
                "%s %s %s id=%s%s%s%s %.0f ms",
                scope["method"],
                scope["path"].encode("unicode_escape").decode(),
                "-" if status is None else status,
                request_id,
                f" key={state['key'].name}" if "key" in state else "",
                f" adapter={state['adapter']}" if "adapter" in state else "",
                "" if tokens is None else f" tokens={tokens.prompt}+{tokens.completion}",
                (time.perf_counter() - started_s) * 1000,
            )


class Cors(CORSMiddleware):
    """Starlette's, whose refusals have the one form of errors."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        headers = {"Vary": response.headers["vary"]}
        return ApiError(400, f"{bytes(response.body).decode()}; see --cors-origin.", headers=headers).response()


class Unexpected:
    """Answers 500 to what nobody expected. Inside of what adds headers to every answer."""

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
            logger.exception("request %s failed", scope["state"]["request_id"])
            if not has_begun:
                error = ApiError(500, "The server failed to answer this request.")
                await error.response()(scope, receive, send)


class BodyBounds:
    """Refuses bodies over `max_bytes` (413), by their declared length or as soon as they grow past it.

    And those that do not come within `timeout_s`, or not a byte in a quarter of that (408): the connection is closed.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            await self._too_large().response()(scope, receive, send)
            return
        received = 0
        is_complete = False
        loop = asyncio.get_running_loop()
        due_s = loop.time() + self._timeout_s

        async def receive_bounded() -> Message:
            nonlocal received, is_complete
            if is_complete:  # what may still come is the client's leave
                return await receive()
            try:
                async with asyncio.timeout_at(min(due_s, loop.time() + self._timeout_s / 4)):
                    message = await receive()
            except TimeoutError:
                raise self._too_slow() from None
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_bytes:
                    raise self._too_large()
                is_complete = not message.get("more_body", False)
            return message

        await self._app(scope, receive_bounded, send)

    def _too_slow(self) -> ApiError:
        message = f"The body did not come within {self._timeout_s:g} s, or stopped for a quarter of that."
        return ApiError(408, message, code="request_timeout", headers={"Connection": "close"})

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self._max_bytes} bytes.", code="request_too_large")
