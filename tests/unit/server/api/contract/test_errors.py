"""Errors have the form of the API that their path belongs to."""

import json

import pytest

from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.contract.message_objects import MessagesError
from stellarbyte_server.api.contract.objects import ErrorBody


@pytest.mark.parametrize(
    ("status", "openai", "anthropic"),
    [
        (400, "invalid_request_error", "invalid_request_error"),
        (401, "authentication_error", "authentication_error"),
        (403, "permission_error", "permission_error"),
        (404, "not_found_error", "not_found_error"),
        (405, "invalid_request_error", "invalid_request_error"),
        (408, "invalid_request_error", "invalid_request_error"),
        (413, "request_too_large", "request_too_large"),
        (429, "rate_limit_error", "rate_limit_error"),
        (431, "invalid_request_error", "invalid_request_error"),
        (500, "server_error", "api_error"),
        (503, "server_error", "overloaded_error"),
    ],
)
def test_the_path_decides_about_the_form(status: int, openai: str, anthropic: str) -> None:
    error = ApiError(status, "It went wrong.", param="model", code="a_code", headers={"Retry-After": "3"})
    for path in ("/v1/messages", "/v1/messages/count_tokens", "/v1/messages/none/such"):
        response = error.response(path, "id-1")
        assert (response.status_code, response.headers["retry-after"]) == (status, "3")
        body = json.loads(response.body)
        MessagesError.model_validate(body)
        assert body["error"] == {"type": anthropic, "message": "model: It went wrong."} and body["request_id"] == "id-1"
    for path in ("", "/", "/v1/chat/completions", "/v1/messages_of_others", "/messages"):
        body = json.loads(error.response(path, "id-1").body)
        ErrorBody.model_validate(body)
        assert body["error"]["type"] == openai


def test_the_path_is_that_below_the_root_path() -> None:
    scope = {"type": "http", "path": "/llm/v1/messages", "root_path": "/llm", "state": {}}
    assert json.loads(ApiError(400, "It went wrong.").response_to(scope).body)["type"] == "error"


def test_anthropics_form_names_the_field_once() -> None:
    for message, param in (("The field 'a[0].b' is odd.", "a[0].b"), ("It is odd.", None)):
        content = ApiError(400, message, param=param).anthropic_content(None)
        assert content["error"]["message"] == message
