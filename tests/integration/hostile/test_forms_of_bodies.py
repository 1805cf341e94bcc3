"""What a body is, as its headers say, and answers to clients of HTTP/1.0."""

import gzip
import json

import httpx
import pytest

from tests.support.over_http import assert_error
from tests.support.servers.raw_http import BODY, connect, read_all

PATHS = ("completions", "chat/completions", "responses", "embeddings")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", ""]
)
def test_a_body_that_is_said_to_be_something_else_is_refused(fake_server, kind: str) -> None:
    for path in (*(f"/v1/{path}" for path in PATHS), "/tokenize"):
        answer = httpx.post(fake_server.url + path, content=BODY, headers={"Content-Type": kind})
        assert "application/json" in assert_error(answer, 415)["message"]


@pytest.mark.parametrize("kind", [None, "application/json", "Application/JSON; charset=utf-8", "application/a+json"])
def test_json_is_read_and_so_is_a_body_without_a_type(fake_server, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    assert httpx.post(f"{fake_server.url}/v1/completions", content=BODY, headers=headers).status_code == 200


def test_a_compressed_body_is_refused_by_its_coding(fake_server) -> None:
    for coding, content in (("gzip", gzip.compress(BODY)), ("zstd", b"\x28\xb5\x2f\xfd"), ("a" * 500, BODY)):
        headers = {"Content-Type": "application/json", "Content-Encoding": coding}
        answer = httpx.post(f"{fake_server.url}/v1/completions", content=content, headers=headers)
        assert repr(coding[:80]) in assert_error(answer, 415)["message"]
        assert answer.headers["accept-encoding"] == "identity"
    headers = {"Content-Type": "application/json", "Content-Encoding": "identity"}
    assert httpx.post(f"{fake_server.url}/v1/completions", content=BODY, headers=headers).status_code == 200


@pytest.mark.parametrize("is_streamed", [True, False])
def test_an_answer_over_http_1_0_ends_with_its_connection(fake_server, is_streamed: bool) -> None:
    body = json.dumps({"model": "fake", "prompt": "hello", "max_tokens": 5, "stream": is_streamed}).encode()
    head = b"POST /v1/completions HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with connect(fake_server) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        fields, _, content = read_all(connection).decode().partition("\r\n\r\n")
    names = [line.lower() for line in fields.splitlines()]
    assert not any(line.startswith("transfer-encoding") for line in names)
    # HTTP/1.0 closes unless told otherwise; newer releases of uvicorn say so, too.
    assert {line for line in names if line.startswith("connection")} <= {"connection: close"}
    if not is_streamed:
        assert json.loads(content)["choices"][0]["text"] == "hello"
        return
    *events, done, end = content.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert "".join(json.loads(event[6:])["choices"][0]["text"] for event in events) == "hello"
