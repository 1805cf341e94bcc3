"""Errors of calls.

StellarByteError
├── ConnectionFailed    no answer: the server cannot be reached, or took too long
├── ServerError         the server answered with an error
└── UnexpectedAnswer    the answer is not that of a StellarByte server of a compatible version
"""

from collections.abc import Mapping
from typing import Protocol

import msgspec


class StellarByteError(Exception):
    """The base of all errors of this package; str() is one sentence for the user."""


class ConnectionFailed(StellarByteError):
    """The server did not answer."""


class UnexpectedAnswer(StellarByteError):
    """An answer with a success status that cannot be parsed."""


class ServerError(StellarByteError):
    """The server answered with an error; its fields are those of the error object."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """`type`, `param` and `code` are None if the answer has no such string, as answers of proxies."""
        super().__init__(status, message, type, param, code, retry_after_s)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


def timed_out(base_url: str) -> ConnectionFailed:
    return ConnectionFailed(f"The server at {base_url} did not answer in time.")


def unreachable(base_url: str, cause: BaseException) -> ConnectionFailed:
    """`cause`: the exception of the connection."""
    detail = str(cause).rstrip(".") or type(cause).__name__
    return ConnectionFailed(f"The server at {base_url} cannot be reached: {detail}.")


class Response(Protocol):
    """The parts of a response that errors are read from, as in httpx and in OpenAI's client."""

    @property
    def status_code(self) -> int: ...
    @property
    def reason_phrase(self) -> str: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def url(self) -> object: ...
    @property
    def content(self) -> bytes: ...


class _Detail(msgspec.Struct):
    """An error object. Values other than strings, of other servers, are ignored."""

    message: str
    type: object = None
    param: object = None
    code: object = None


class _ErrorBody(msgspec.Struct):
    error: _Detail


def server_error(response: Response) -> ServerError:
    """The error of a response with an error status."""
    status = response.status_code
    try:
        detail = msgspec.json.decode(response.content, type=_ErrorBody).error
    except msgspec.DecodeError:
        what = f"{status} {response.reason_phrase}".rstrip()
        detail = _Detail(f"The answer from {response.url} is {what}.")
    return ServerError(
        status,
        detail.message,
        type=_text(detail.type),
        param=_text(detail.param),
        code=_text(detail.code),
        retry_after_s=_retry_after_s(response),
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _retry_after_s(response: Response) -> float | None:
    """None also for a date, which proxies may send: clocks may differ."""
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isascii() and value.isdigit() else None
