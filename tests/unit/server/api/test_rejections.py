"""Reasons of rejections: a fixed list, whatever a request or the engine says."""

import pytest

from stellarbyte_server.api.rejections import rejection_reason
from stellarbyte_server.observe.reasons import REASONS
from stellarbyte_server.observe.record import RequestRecord
from tests.support.application import route_table


def reason(status: int | None, code: str | None = None, method: str = "POST", path: str = "/v1/completions"):
    record = RequestRecord(request_id="r", error_code=code)
    return rejection_reason({"type": "http", "method": method, "path": path}, route_table(), status, record)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, None, "invalid_request"),
        (400, "context_length_exceeded", "context_length_exceeded"),
        (400, "made up", "invalid_request"),
        (401, "invalid_api_key", "unauthorized"),
        (403, "model_not_allowed", "forbidden"),
        (404, "model_not_found", "model_not_found"),
        (408, "request_timeout", "request_timeout"),
        (413, "request_too_large", "request_too_large"),
        (431, "header_too_large", "header_too_large"),
        (429, "queue_full", "queue_full"),
        (429, "rate_limit_exceeded", "rate_limit_exceeded"),
        (500, None, "server_error"),
        (503, "queue_timeout", "queue_timeout"),
        (503, "engine_unavailable", "engine_unavailable"),
        (503, "made up", "unavailable"),
    ],
)
def test_the_reason_is_of_the_list(status: int, code: str | None, expected: str) -> None:
    assert reason(status, code) == expected
    assert expected in REASONS


@pytest.mark.parametrize(
    "answered",
    [
        {"status": 200},
        {"status": None},  # nothing was sent
        {"status": 499},  # the client left
        {"status": 503, "method": "GET", "path": "/health"},
        {"status": 404, "method": "GET", "path": "/v1/models/other"},
        {"status": 404, "path": "/v1/made-up"},
        {"status": 403, "path": "/v1/load_lora_adapter"},
    ],
)
def test_what_is_no_rejection_of_a_users_request(answered: dict) -> None:
    assert reason(**answered) is None


def test_an_answer_that_fails_once_it_runs_is_no_rejection() -> None:
    """The engine counts it as aborted."""
    record = RequestRecord(request_id="r", streams=[object()])
    scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
    assert rejection_reason(scope, route_table(), 500, record) is None
