"""What happens around every request, as plain ASGI: its id, its line in the log, its errors, its size.

Nothing here wraps `receive` in a way that hides a disconnect.
"""

import logging
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import ApiError

logger = logging.getLogger("server.access")


class RequestLog:
    """Gives each request an id, logs one line when it ends, and answers 500 to what nobody expected."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.perf_counter()
        request_id = secrets.token_hex(8)
        state = scope.setdefault("state", {})
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s failed", request_id)
            if status is None:
                error = ApiError(500, "The server failed to answer this request.")
                await error.response()(scope, receive, send_with_id)
        finally:
            tokens = state.get("tokens")
            logger.info(
                "%s %s %s id=%s%s%s %.0f ms",
                scope["method"],
                scope["path"].encode("unicode_escape").decode(),
                "-" if status is None else status,
                request_id,
                f" adapter={state['adapter']}" if "adapter" in state else "",
                "" if tokens is None else f" tokens={tokens.prompt}+{tokens.completion}",
                (time.perf_counter() - started_s) * 1000,
            )


class BodyLimit:
    """Refuses bodies over `max_bytes` (413), by their declared length or as soon as they grow past it."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            await self._too_large().response()(scope, receive, send)
            return
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_bytes:
                    raise self._too_large()
            return message

        await self._app(scope, receive_counted, send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self._max_bytes} bytes.", code="request_too_large")
