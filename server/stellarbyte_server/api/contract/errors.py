"""Errors of the API, in one format: {"error": {message, type, param, code}}.

The routes of Anthropic's API use its format: {"type": "error", "error": {type, message}, "request_id"}.
"""

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from stellarbyte_server.access.paths import is_anthropics, path_of
from stellarbyte_server.client.engine_client import EngineDead
from stellarbyte_server.protocol.request import (
    ADAPTER_LOADING,
    ADAPTER_NOT_FOUND,
    GRAMMAR_REFUSED,
    GRAMMARS_BUSY,
    INTERNAL_ERROR,
    MODEL_NOT_ALLOWED,
    MODEL_NOT_FOUND,
    QUEUE_FULL,
    QUEUE_TIMEOUT,
    SHUTTING_DOWN,
    RequestRejected,
)

_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}
# Types in Anthropic's format; other statuses get one of the fallbacks.
_ANTHROPIC_TYPES = _TYPES | {HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error"}

# Temporary refusals by the engine: status, and seconds until a retry.
_NOT_NOW = {QUEUE_FULL: (429, "1"), QUEUE_TIMEOUT: (503, "5"), GRAMMARS_BUSY: (503, "5"), SHUTTING_DOWN: (503, "5")}
# Types whose names differ between Python and JSON.
_WRONG_KINDS = {
    "model_type": "it should be an object",
    "dict_type": "it should be an object",
    "list_type": "it should be a list",
}
VARIANT = "variant "  # prefix of the tags of unions (bodies.variants) in the locations of errors; no field begins so
_STATUSES: dict[str | None, int] = {
    ADAPTER_LOADING: 409, MODEL_NOT_FOUND: 404, ADAPTER_NOT_FOUND: 404, MODEL_NOT_ALLOWED: 403,
}  # fmt: skip


class ApiError(Exception):
    """An error response; str() is one sentence for the user."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def content(self) -> dict[str, Any]:
        return error_content(self.status, str(self), self.param, self.code)

    def anthropic_content(self, request_id: str | None) -> dict[str, Any]:
        """In Anthropic's format; also the last event of a failed stream."""
        fallback = "api_error" if self.status >= 500 else "invalid_request_error"
        kind = _ANTHROPIC_TYPES.get(HTTPStatus(self.status), fallback)
        is_named = self.param is None or self.param in str(self)
        message = str(self) if is_named else f"{self.param}: {self}"  # the format has no field for `param`
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}

    def response(self, path: str, request_id: str | None) -> JSONResponse:
        """In the format of the API to which a path (without --root-path) belongs."""
        content = self.anthropic_content(request_id) if is_anthropics(path) else self.content()
        return JSONResponse(content, self.status, self.headers)

    def response_to(self, scope: Scope) -> JSONResponse:
        record = scope.get("state", {}).get("record")
        return self.response(path_of(scope), None if record is None else record.request_id)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send this error, and record it for the access log."""
        if (record := scope.get("state", {}).get("record")) is not None:
            record.error_code = self.code
        await self.response_to(scope)(scope, receive, send)


def error_content(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error response, and the last event of a failed stream."""
    fallback = "server_error" if status >= 500 else "invalid_request_error"
    return {
        "error": {"message": message, "type": _TYPES.get(HTTPStatus(status), fallback), "param": param, "code": code}
    }


def no_route(path: str) -> ApiError:
    return ApiError(404, f"There is no route {path}.")


def method_not_allowed(method: str, path: str, allowed: Iterable[str]) -> ApiError:
    message = f"The method {method} is not allowed for {path}."
    return ApiError(405, message, headers={"Allow": ", ".join(allowed)})


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str) -> ApiError:
    return ApiError(503, message, code="engine_unavailable", headers={"Retry-After": "5"})


def from_engine(error: RequestRejected | EngineDead, grammar_param: str | None = None) -> ApiError:
    """The engine's refusal as an API error; `grammar_param`: the field with the grammar."""
    if isinstance(error, EngineDead):
        return unavailable(str(error))
    if error.retry_after_s is not None:
        return ApiError(429, str(error), code=error.code, headers={"Retry-After": str(error.retry_after_s)})
    if error.code in _NOT_NOW:
        status, retry_after_s = _NOT_NOW[error.code]
        return ApiError(status, str(error), code=error.code, headers={"Retry-After": retry_after_s})
    if error.code == INTERNAL_ERROR:
        return ApiError(500, str(error))
    status = _STATUSES.get(error.code, 400)
    param = grammar_param if error.code == GRAMMAR_REFUSED else error.param
    return ApiError(status, str(error), param=param, code=error.code)


def from_validation(error: ValidationError) -> ApiError:
    """The first error of a body, as one sentence that names the field."""
    first = error.errors(include_url=False, include_input=False)[0]
    param = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        return bad_request(f"The field {param!r:.200} is unknown.", param)
    if first["type"] == "missing":
        return bad_request(f"The field {param!r:.200} is required.", param)
    why = _WRONG_KINDS.get(first["type"], first["msg"])
    return bad_request(f"The field {param!r:.200} is not valid: {_lower_first(why)}.", param)


def _path(location: tuple[int | str, ...]) -> str:
    """The path of a field, without the tags of unions: ("messages", 0, "role") as messages[0].role."""
    path = ""
    for step in location:
        if isinstance(step, str) and step.startswith(VARIANT):
            continue
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(".")


async def answer_api_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler for ApiError."""
    assert isinstance(error, ApiError)
    request.state.record.error_code = error.code
    return error.response_to(request.scope)


async def answer_no_tokenizer(request: Request, error: Exception) -> JSONResponse:
    """Exception handler for NoTokenizerError, which every route with texts may raise."""
    return bad_request(str(error)).response_to(request.scope)


async def answer_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Exception handler for the framework's own errors: missing files of /docs."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return no_route(request.url.path).response_to(request.scope)
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response_to(request.scope)
