"""What a running server logs: one line for each request, in one form, without prompts and keys."""

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.cases import some
from tests.support.servers.fake_engine import CRASH, SLOW
from tests.support.servers.server_process import FAKE, ServerProcess, running

PROMPT = "correct horse battery"
KEY = "sk-hidden-1234"
NUM_STREAMS = 24  # on a connection each; the kernel spreads them: all on one of two processes once in 8 million runs


def json_lines(server: ServerProcess) -> list[dict[str, Any]]:
    """Every complete line; what does not parse fails the test."""
    text = server.log()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def line_of(server: ServerProcess, request_id: str) -> dict[str, Any]:
    """It is written after the answer has gone out."""
    deadline_s = time.monotonic() + 60
    while True:
        found = [line for line in json_lines(server) if line.get("request_id") == request_id]
        if found:
            (line,) = found
            return line
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def ask(server: ServerProcess, request_id: str, **fields: Any) -> httpx.Response:
    headers = {"X-Request-Id": request_id, "Authorization": f"Bearer {KEY}"}
    body = {"model": "fake", "prompt": PROMPT, "max_tokens": 5, **fields}
    return httpx.post(f"{server.url}/v1/completions?token={KEY}", json=body, headers=headers, timeout=30)


@pytest.mark.parametrize("num_workers", some([1, 2], 1))
def test_json_lines_tell_of_every_request(fake_model: str, num_workers: int) -> None:
    flags = ("--log-format", "json", "--api-key", KEY, "--http-workers", str(num_workers))
    with running(FAKE, "--model", fake_model, *flags) as server:
        for number in range(NUM_STREAMS):
            answer = ask(server, f"stream-{number}", stream=True)
            assert answer.headers["x-request-id"] == f"stream-{number}"
        lines = [line_of(server, f"stream-{number}") for number in range(NUM_STREAMS)]
        assert {line["process"] for line in lines} == ({"http"} if num_workers == 1 else {"http-1", "http-2"})
        line = lines[0]
        assert (line["method"], line["path"], line["status"], line["level"]) == ("POST", "/v1/completions", 200, "info")
        assert (line["prompt_tokens"], line["completion_tokens"], line["finish_reason"]) == (len(PROMPT), 5, "length")
        assert line["key"] == "api-key-1"
        assert 0 <= line["queue_s"] <= line["ttft_s"] <= line["total_s"] < 5

        assert ask(server, "refused", mood="good").status_code == 400
        refused = line_of(server, "refused")
        assert refused["status"] == 400 and "ttft_s" not in refused and "finish_reason" not in refused
        assert ask(server, "unknown-model", model="other").status_code == 404
        assert line_of(server, "unknown-model")["error"] == "model_not_found"
        body = {"model": "fake", "prompt": SLOW, "max_tokens": 500, "stream": True}
        headers = {"X-Request-Id": "left", "Authorization": f"Bearer {KEY}"}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers) as stream:
            next(stream.iter_lines())
        assert line_of(server, "left")["finish_reason"] == "abort"

        assert ask(server, "failed", prompt=CRASH).status_code == 500
        assert line_of(server, "failed")["finish_reason"] == "error"
        assert server.wait(15) == 1
        lines = json_lines(server)
        assert {line["process"] for line in lines} >= {"http", "engine"}
        (crash,) = [line for line in lines if line["process"] == "engine" and "traceback" in line]
        assert crash["traceback"].endswith("RuntimeError: told to crash")
        assert all({"time", "level", "process", "logger", "message"} <= line.keys() for line in lines)
        assert PROMPT not in server.log() and KEY not in server.log()


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"\x16\x03\x01\r\n\r\n", {"status": 400}),
        (
            b"GET /version%20a?key=hidden HTTP/1.1\r\nX-Request-Id: mine\r\nHost",
            {"status": 408, "method": "GET", "path": "/version%20a", "request_id": "mine", "error": "request_timeout"},
        ),
        (
            b"GET /version HTTP/1.1\r\nX-Request-Id: mine\r\n" + b"a: b\r\n" * 201,
            {"status": 431, "method": "GET", "path": "/version", "request_id": "mine", "error": "header_too_large"},
        ),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: mine\r\n"
            b"Transfer-Encoding: chunked\r\n\r\nnothing",
            {"status": 400, "method": "POST", "path": "/v1/completions", "request_id": "mine"},
        ),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"0\r\n" + b"a: b\r\n" * 201,
            {"status": 431, "method": "POST", "path": "/v1/completions", "error": "header_too_large"},
        ),
    ],
    ids=["garbage", "slow", "large", "body", "trailers"],
)
def test_what_is_refused_as_it_comes_has_its_line_and_its_id(
    impatient: ServerProcess, sent: bytes, expected: dict[str, Any]
) -> None:
    before = len(json_lines(impatient))
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=30) as connection:
        connection.sendall(sent)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 %d " % expected["status"])
    (request_id,) = re.findall(rb"(?i)\r\nx-request-id: (\S+)\r\n", answer)
    deadline_s = time.monotonic() + 10
    while not (lines := json_lines(impatient)[before:]):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    (line,) = lines
    wanted = {"method": None, "path": None, "error": None, "request_id": request_id.decode()} | expected
    assert {name: line.get(name) for name in wanted} == wanted
    assert line["logger"] == "server.access" and "hidden" not in impatient.log()


@pytest.fixture(scope="module")
def impatient(fake_model: str) -> Iterator[ServerProcess]:
    with running(FAKE, "--model", fake_model, "--log-format", "json", "--receive-timeout", "1") as server:
        httpx.get(f"{server.url}/version", headers={"X-Request-Id": "first"})
        line_of(server, "first")
        yield server


def test_a_path_cannot_be_taken_for_fields(fake_server: ServerProcess) -> None:
    path = "/v1/completions%20200%20request_id=x%20key=admin%0astatus=%22%c3%a9"
    httpx.get(f"{fake_server.url}{path}", headers={"X-Request-Id": "forger"})
    deadline_s = time.monotonic() + 10
    while "request_id=forger" not in fake_server.log():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    (line,) = [line for line in fake_server.log().splitlines() if "request_id=forger" in line]
    shown = "/v1/completions%20200%20request_id=x%20key=admin%0Astatus=%22%C3%A9"
    assert f" GET {shown} 404 request_id=forger " in line and " key=" not in line


def test_a_start_that_fails_is_one_json_line(tmp_path: Path) -> None:
    server = ServerProcess(FAKE, "--model", str(tmp_path / "none"), "--log-format", "json")
    assert server.wait(60) == 1
    (error,) = [line for line in json_lines(server) if line["level"] == "error"]
    assert "there is no model folder" in error["message"]


def test_an_unsafe_request_id_is_in_no_log_and_no_answer(fake_server: ServerProcess) -> None:
    given = "x<script>y"
    answer = httpx.get(f"{fake_server.url}/version", headers={"X-Request-Id": given})
    assert answer.headers["x-request-id"] != given
    deadline_s = time.monotonic() + 60
    while answer.headers["x-request-id"] not in fake_server.log():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert given not in fake_server.log()
