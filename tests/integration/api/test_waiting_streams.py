"""A stream that waits long in the queue: headers and a ping first, and what comes of it as events."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator

import httpx
import pytest

from tests.support.over_http import wait_until_idle
from tests.support.servers.fake_engine import HANG, REJECT, SLOW
from tests.support.servers.processes import engine_pid
from tests.support.servers.server_process import ServerProcess, running


@pytest.fixture(scope="module")
def server(fake_model: str) -> Iterator[ServerProcess]:
    with running("tests.support.servers.impatient_server", "--model", fake_model) as server:
        yield server


@contextlib.contextmanager
def late(server: ServerProcess, prompt: str, **fields: object) -> Iterator[Iterator[str]]:
    """The lines of a stream that the engine does not hear of before the client has its headers and a ping."""
    body = {"model": "fake", "prompt": prompt, "max_tokens": 3, "stream": True, **fields}
    engine = engine_pid(server)
    os.kill(engine, signal.SIGSTOP)
    try:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as answer:
            assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
            lines = answer.iter_lines()
            assert [next(lines), next(lines)] == [": ping", ""]
            os.kill(engine, signal.SIGCONT)
            yield lines
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(engine, signal.SIGCONT)


def test_an_answer_that_begins_late_is_whole(server: ServerProcess) -> None:
    with late(server, "abc") as lines:
        *events, done = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    chunks = [json.loads(event) for event in events]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abc" and done == "[DONE]"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_a_late_refusal_is_an_event_and_counts_as_one(server: ServerProcess) -> None:
    with late(server, REJECT) as lines:
        (refusal,) = [line for line in lines if line]
    error = json.loads(refusal.removeprefix("data: "))["error"]
    assert (error["code"], error["param"], error["type"]) == ("unwanted", "prompt", "invalid_request_error")
    server.wait_logged("error=unwanted")
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'rejected_requests_total{model_name="fake",reason="invalid_request"} 1.0' in metrics


def test_who_leaves_while_waiting_leaves_nothing_behind(server: ServerProcess) -> None:
    for _ in range(3):
        with late(server, SLOW, max_tokens=2000):
            pass
    wait_until_idle(server)


def test_an_engine_that_dies_meanwhile_ends_the_stream_with_an_error(server: ServerProcess) -> None:
    """Last: it takes the engine along."""
    with late(server, HANG) as lines:
        os.kill(engine_pid(server), signal.SIGKILL)
        (event,) = [line for line in lines if line]
        assert json.loads(event.removeprefix("data: "))["error"]["type"] == "server_error"
