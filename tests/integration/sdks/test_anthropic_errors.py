"""Errors of the routes of Anthropic's API have its form, whoever refuses: the official client knows them all."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from tests.support.clients.anthropic_client import strict_client
from tests.support.servers.fake_engine import CRASH, SLOW
from tests.support.servers.server_process import FAKE, ServerProcess, running

KEYS = """
[alice]
key = "key-alice"
[bob]
key = "key-bob"
models = ["an-adapter"]
[carol]
key = "key-carol"
requests_per_minute = 1
[dora]
key = "key-dora"
max_tokens_per_request = 8
"""
MAX_BYTES = 10_000


@pytest.fixture(scope="module")
def guarded(fake_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    file: Path = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(KEYS)
    file.chmod(0o600)
    flags = ["--model", fake_model, "--keys", str(file), "--max-body-bytes", str(MAX_BYTES)]
    with running(FAKE, *flags) as server:
        yield server


def ask(
    server: ServerProcess, key: str, text: str = "hi", max_tokens: int = 4, **fields: Any
) -> anthropic.types.Message:
    body = {"model": "fake", "max_tokens": max_tokens, "messages": [{"role": "user", "content": text}]} | fields
    with strict_client(server.url, key) as client:
        return client.messages.create(**body)


def failure(kind: type[anthropic.APIStatusError], server: ServerProcess, key: str, *args: Any, **fields: Any) -> str:
    """Its type and its sentence; the whole error has the API's form."""
    with pytest.raises(kind) as caught:
        ask(server, key, *args, **fields)
    return told(caught.value.body, caught.value.response.headers)


def told(body: Any, headers: Any) -> str:
    assert body.keys() == {"type", "error", "request_id"} and body["type"] == "error"
    assert body["error"].keys() == {"type", "message"}
    assert headers["request-id"] == headers["x-request-id"] == body["request_id"]
    return f"{body['error']['type']}: {body['error']['message']}"


def test_keys_come_in_either_header(guarded: ServerProcess) -> None:
    assert ask(guarded, "key-alice").content[0].text
    with anthropic.Anthropic(base_url=guarded.url, auth_token="key-alice", api_key=None, max_retries=0) as client:
        counted = client.messages.count_tokens(model="fake", messages=[{"role": "user", "content": "hi"}])
    assert counted.input_tokens > 2
    assert httpx.get(f"{guarded.url}/v1/models", headers={"x-api-key": "key-alice"}).status_code == 200


def test_refusals_before_the_body_is_read_have_the_form(guarded: ServerProcess) -> None:
    assert failure(anthropic.AuthenticationError, guarded, "wrong").startswith("authentication_error: ")
    assert "x-api-key" in failure(anthropic.AuthenticationError, guarded, "wrong")
    too_large = failure(anthropic.APIStatusError, guarded, "key-alice", "x" * MAX_BYTES)
    assert too_large == f"request_too_large: The body is larger than {MAX_BYTES} bytes."
    for method, path, status, kind in (
        ("GET", "/v1/messages", 405, "invalid_request_error"),
        ("POST", "/v1/messages/batches", 404, "not_found_error"),
    ):
        answer = httpx.request(method, guarded.url + path, headers={"x-api-key": "key-alice"})
        assert answer.status_code == status
        assert told(answer.json(), answer.headers).startswith(f"{kind}: ")
    other = httpx.post(f"{guarded.url}/v1/messages_of_others", headers={"x-api-key": "key-alice"})
    assert other.json()["error"].keys() == {"message", "type", "param", "code"} and "request-id" not in other.headers


def test_refusals_of_what_is_asked_for_have_the_form(guarded: ServerProcess) -> None:
    assert failure(anthropic.BadRequestError, guarded, "key-alice", max_tokens=0).startswith("invalid_request_error: ")
    broken = httpx.post(f"{guarded.url}/v1/messages", content=b"{", headers={"x-api-key": "key-alice"})
    assert told(broken.json(), broken.headers).startswith("invalid_request_error: The body is not valid JSON")
    assert failure(anthropic.PermissionDeniedError, guarded, "key-bob").startswith("permission_error: ")
    assert failure(anthropic.NotFoundError, guarded, "key-alice", model="other").startswith("not_found_error: ")
    long = failure(anthropic.BadRequestError, guarded, "key-alice", "x" * 5000)
    assert long.startswith("invalid_request_error: ") and "context" in long


def test_limits_of_keys_hold(guarded: ServerProcess) -> None:
    assert "'max_tokens'" not in failure(anthropic.BadRequestError, guarded, "key-dora", max_tokens=9)
    assert ask(guarded, "key-dora", max_tokens=8).usage.output_tokens == 8
    ask(guarded, "key-carol")
    for _ in range(2):
        with pytest.raises(anthropic.RateLimitError) as caught:
            ask(guarded, "key-carol")
        assert told(caught.value.body, caught.value.response.headers).startswith("rate_limit_error: ")
        assert int(caught.value.response.headers["retry-after"]) > 0
    with strict_client(guarded.url, "key-carol") as client, pytest.raises(anthropic.RateLimitError):
        client.messages.count_tokens(model="fake", messages=[{"role": "user", "content": "hi"}])


def num_rejected(server: ServerProcess) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    name = "stellarbyte:rejected_requests_total{"
    (line,) = [line for line in lines if line.startswith(name) and 'reason="model_not_found"' in line]
    return float(line.rsplit(" ", 1)[1])


def test_requests_are_logged_and_counted_as_others_are(guarded: ServerProcess) -> None:
    before = guarded.metric("vllm:generation_tokens_total")
    rejected = num_rejected(guarded)
    ask(guarded, "key-alice", max_tokens=5)
    failure(anthropic.NotFoundError, guarded, "key-alice", model="other")
    assert guarded.metric("vllm:generation_tokens_total") == before + 5
    assert num_rejected(guarded) == rejected + 1
    (line, *_) = [line for line in guarded.log().splitlines() if "completion_tokens=5" in line]
    assert "POST /v1/messages 200" in line and "key=alice" in line and "finish_reason=length" in line


def test_failures_of_the_engine_have_the_form_also_within_a_stream(guarded: ServerProcess) -> None:
    """The last of the file: the engine is gone after it."""
    body = {"model": "fake", "max_tokens": 1000, "stream": True, "messages": [{"role": "user", "content": SLOW}]}
    with httpx.stream(
        "POST", f"{guarded.url}/v1/messages", json=body, headers={"x-api-key": "key-alice"}, timeout=60
    ) as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: message_start"
        assert failure(anthropic.InternalServerError, guarded, "key-alice", CRASH).startswith(
            ("api_error", "overloaded")
        )
        *_, name, data, _ = lines
        assert name == "event: error"
        assert told(json.loads(data.removeprefix("data: ")), stream.headers).startswith(("api_error: ", "overloaded_"))
    assert failure(anthropic.APIStatusError, guarded, "key-alice").startswith("overloaded_error: ")
