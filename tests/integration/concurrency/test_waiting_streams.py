"""A stream that waits long in the queue: headers and a ping first, and what comes of it as events."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator

import httpx
import pytest

from tests.support.over_http import wait_until_idle
from tests.support.servers.fake_engine import HANG, REJECT, SLOW, make_model_folder
from tests.support.servers.processes import engine_pid
from tests.support.servers.server_process import ServerProcess, running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("models") / "fake"
    make_model_folder(folder, chat_template="{{ messages[0].content }}")  # chats, too, begin with what the engine obeys
    with running("tests.support.stubs.impatient_server", "--model", str(folder)) as server:
        yield server


@contextlib.contextmanager
def late(server: ServerProcess, prompt: str, **fields: object) -> Iterator[Iterator[str]]:
    """The lines of a completion that is streamed late."""
    body = {"model": "fake", "prompt": prompt, "max_tokens": 3, "stream": True, **fields}
    with late_stream(server, "/v1/completions", body) as lines:
        yield lines


@contextlib.contextmanager
def late_stream(server: ServerProcess, path: str, body: dict[str, object]) -> Iterator[Iterator[str]]:
    """The lines of a stream that the engine does not hear of before the client has its headers and a ping."""
    engine = engine_pid(server)
    os.kill(engine, signal.SIGSTOP)
    try:
        with httpx.stream("POST", server.url + path, json=body, timeout=30) as answer:
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


def chat_of(path: str, text: str) -> dict[str, object]:
    if path == "/v1/responses":
        return {"model": "fake", "input": text, "max_output_tokens": 3, "stream": True}
    return {"model": "fake", "messages": [{"role": "user", "content": text}], "max_tokens": 3, "stream": True}


ENDS = {  # of a late answer and of a late refusal
    "/v1/responses": ("response.incomplete", ["error", "response.failed"]),
    "/v1/messages": ("message_stop", ["error"]),
}


@pytest.mark.parametrize("path", ENDS)
def test_other_chat_apis_wait_in_the_same_way(server: ServerProcess, path: str) -> None:
    ends_with, refusal = ENDS[path]
    with late_stream(server, path, chat_of(path, "abc")) as lines:
        assert [line.removeprefix("event: ") for line in lines if line.startswith("event: ")][-1] == ends_with
    with late_stream(server, path, chat_of(path, REJECT)) as lines:
        assert [line.removeprefix("event: ") for line in lines if line.startswith("event: ")] == refusal


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
