"""What can go wrong with a call. Knows the server's error object, and no calls.

StellarByteError
├── ConnectionFailed    nothing answered: the server cannot be reached, or took too long
├── ServerError         the server answered with an error
└── UnexpectedAnswer    what answered is not a StellarByte server, or one of a version too far from this client's
"""

import httpx
import msgspec


class StellarByteError(Exception):
    """The base of all errors of this package; str() is one sentence for the user."""


class ConnectionFailed(StellarByteError):
    """There was no answer."""


class UnexpectedAnswer(StellarByteError):
    """An answer that says it is good, but cannot be read."""


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
        """`type`, `param` and `code` are None where the answer had no error object, as those of a proxy."""
        super().__init__(status, message, type, param, code, retry_after_s)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class _Detail(msgspec.Struct):
    message: str
    type: str | None = None
    param: str | None = None
    code: str | None = None


class _ErrorBody(msgspec.Struct):
    error: _Detail


def server_error(response: httpx.Response) -> ServerError:
    """The error that an answer with an error's status stands for."""
    status = response.status_code
    try:
        detail = msgspec.json.decode(response.content, type=_ErrorBody).error
    except msgspec.DecodeError:
        what = f"{status} {response.reason_phrase}".rstrip()
        detail = _Detail(f"The answer from {response.url} is {what}.")
    return ServerError(status, detail.message, detail.type, detail.param, detail.code, _retry_after_s(response))


def _retry_after_s(response: httpx.Response) -> float | None:
    """None also for a date, which proxies may send: this machine's clock need not be theirs."""
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isascii() and value.isdigit() else None
