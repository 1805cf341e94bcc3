"""--http-workers: several HTTP processes on one port and one engine behave as one server."""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.support.over_http import NUM_CONNECTIONS, get_often
from tests.support.servers.fake_engine import SLOW, make_model_folder
from tests.support.servers.processes import assert_gone, engine_pid, worker_pids
from tests.support.servers.server_process import FAKE, ServerProcess, running


def two_workers(model: str, *flags: str):
    return running(FAKE, "--model", model, "--http-workers", "2", *flags)


@pytest.fixture(scope="module")
def both(fake_model: str) -> Iterator[ServerProcess]:
    """For tests that leave its processes as they are."""
    with two_workers(fake_model) as server:
        yield server


class OpenStream:
    """An answer that is being streamed, its first event read. It ends when this object goes."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.iter_lines()
        self.lines = [next(self._lines)]

    def read(self) -> str:
        """Read to the end; the last event, or what broke the connection."""
        try:
            self.lines += [line for line in self._lines if line]
        except httpx.TransportError as error:
            return repr(error)
        return self.lines[-1]

    @property
    def text(self) -> str:
        events = [line.removeprefix("data: ") for line in self.lines if line.startswith("data: {")]
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def open_stream(stack: contextlib.ExitStack, server: ServerProcess, prompt: str, max_tokens: int) -> OpenStream:
    """A streaming completion on a connection of its own."""
    body = {"model": "fake", "prompt": prompt, "max_tokens": max_tokens, "stream": True}
    request = httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30)
    return OpenStream(stack.enter_context(request))


def open_streams(stack: contextlib.ExitStack, server: ServerProcess, max_tokens: int) -> list[OpenStream]:
    return [open_stream(stack, server, f"{SLOW} {i:02} ", max_tokens) for i in range(NUM_CONNECTIONS)]


def test_streams_on_both_workers_get_their_own_text_and_every_route_answers_the_same(both):
    with contextlib.ExitStack() as stack:
        streams = open_streams(stack, both, max_tokens=60)
        for path in ("/v1/models", "/health", "/ready", "/version"):
            assert len({(answer.status_code, answer.text) for answer in get_often(both, path)}) == 1, path
        for i, stream in enumerate(streams):
            assert stream.read() == "data: [DONE]"
            assert stream.text == (f"{SLOW} {i:02} " * 10)[:60]
        deadline_s = time.monotonic() + 60
        while len(streamed_by := re.findall(r"INFO (http-\d) server.access: POST", both.log())) < NUM_CONNECTIONS:
            assert time.monotonic() < deadline_s, "a request is in no log"  # its line comes after its last byte
            time.sleep(0.05)
        assert len(streamed_by) == NUM_CONNECTIONS
        assert set(streamed_by) == {"http-1", "http-2"}


def test_counters_never_run_backwards_whichever_worker_is_asked(both):
    with contextlib.ExitStack() as stack:
        stream = open_stream(stack, both, SLOW, max_tokens=2000)
        totals = []
        for _ in range(NUM_CONNECTIONS):
            totals.append(both.metric("vllm:generation_tokens_total"))
            time.sleep(0.03)
        assert totals == sorted(totals)
        assert len(set(totals)) > NUM_CONNECTIONS / 2, "old figures were served"
        assert both.metric("vllm:num_requests_running") == 1, "it was open all the time"
        del stream  # which ends it
        assert len(set(re.findall(r"INFO (http-\d) server.access: GET /metrics", both.log()))) == 2


def test_a_killed_worker_takes_only_its_own_streams_and_is_replaced(fake_model):
    with two_workers(fake_model) as server, contextlib.ExitStack() as stack:
        streams = open_streams(stack, server, max_tokens=300)
        killed, survivor = worker_pids(server)
        os.kill(killed, signal.SIGKILL)
        time.sleep(0.5)
        running_now = server.metric("vllm:num_requests_running")
        ends = [stream.read() for stream in streams]
        complete = ends.count("data: [DONE]")
        assert 0 < complete < NUM_CONNECTIONS
        assert running_now == complete, "the engine works for streams that nobody reads"
        deadline_s = time.monotonic() + 60
        while len(worker_pids(server)) < 2 or "starting another" not in server.log():
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        assert survivor in worker_pids(server)
        assert {answer.status_code for answer in get_often(server, "/health")} == {200}
        assert server.process.poll() is None


@pytest.mark.slow
def test_requests_of_a_worker_that_hangs_are_dropped(fake_model):
    with two_workers(fake_model) as server, contextlib.ExitStack() as stack:
        streams = open_streams(stack, server, max_tokens=600)  # 12 s, more than a process may be silent
        stopped, _ = worker_pids(server)
        os.kill(stopped, signal.SIGSTOP)
        try:
            deadline_s = time.monotonic() + 60
            while "no heartbeat" not in server.log():
                assert time.monotonic() < deadline_s
                time.sleep(0.1)
        finally:
            os.kill(stopped, signal.SIGCONT)
        running_now = server.metric("vllm:num_requests_running")
        ends = [stream.read() for stream in streams]
        complete = ends.count("data: [DONE]")
        assert 0 < complete == running_now < len(streams)
        for end in ends:
            assert end == "data: [DONE]" or json.loads(end.removeprefix("data: "))["error"]["type"] == "server_error"


def test_workers_never_outlive_their_parent(fake_model):
    with two_workers(fake_model) as server:
        pids = [*worker_pids(server), engine_pid(server)]
        server.process.kill()
        server.wait()
        assert_gone(pids)


def test_a_start_that_fails_in_the_workers_says_why_once(tmp_path):
    (make_model_folder(tmp_path / "model") / "tokenizer.json").write_text("{")
    server = ServerProcess(FAKE, "--model", str(tmp_path / "model"), "--http-workers", "3")
    assert server.wait(60) == 1
    errors = [line for line in server.log().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "tokenizer.json" in errors[0]
    assert "Traceback" not in server.log()


def test_a_port_that_another_server_shares_among_its_workers_is_busy(both, fake_model):
    second = ServerProcess(FAKE, "--model", fake_model, "--http-workers", "2", port=both.port)
    assert second.wait(30) == 1
    assert str(both.port) in second.log()
