"""Reasons of failed requests, as a fixed set of labels for metrics."""

from http import HTTPStatus

from stellarbyte_server.protocol.request import (
    ADAPTER_FAILED,
    ADAPTER_NOT_FOUND,
    GRAMMAR_REFUSED,
    GRAMMARS_BUSY,
    MODEL_NOT_FOUND,
    QUEUE_FULL,
    QUEUE_TIMEOUT,
    RATE_LIMITED,
)

# Error codes with their own reason; others go by the status.
CODES = (
    "context_length_exceeded",
    "engine_unavailable",
    MODEL_NOT_FOUND,
    ADAPTER_NOT_FOUND,
    ADAPTER_FAILED,
    GRAMMAR_REFUSED,
    GRAMMARS_BUSY,
    QUEUE_FULL,
    QUEUE_TIMEOUT,
    RATE_LIMITED,
    "too_many_connections",
)
STATUSES = {
    HTTPStatus.UNAUTHORIZED: "unauthorized",
    HTTPStatus.FORBIDDEN: "forbidden",
    HTTPStatus.REQUEST_TIMEOUT: "request_timeout",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: RATE_LIMITED,
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "header_too_large",
    HTTPStatus.SERVICE_UNAVAILABLE: "unavailable",
}
OTHERS = ("invalid_request", "server_error")
REASONS = tuple(dict.fromkeys((*CODES, *STATUSES.values(), *OTHERS)))


def reason_of_error(status: int, code: str | None) -> str:
    """The reason, one of REASONS, of an error response."""
    if code in CODES:
        return code
    return STATUSES.get(HTTPStatus(status), "server_error" if status >= 500 else "invalid_request")
