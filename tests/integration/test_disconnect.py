"""Clients that leave free what their requests held; a dead engine and a shutdown are told to those who wait."""

import json
import os
import random
import re
import signal
import socket
import time

import httpx
import pytest

from tests.support.fake_engine import CRASH, SLOW
from tests.support.over_http import wait_until_idle
from tests.support.server_process import FAKE, ServerProcess, running


def post_and_leave(server: ServerProcess, body: dict, after_s: float) -> None:
    """Send a completion request and close the connection `after_s` later, having read what there was."""
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + content)
        if after_s:
            time.sleep(after_s)


def num_left(server: ServerProcess) -> int:
    """Requests whose client left."""
    metrics = httpx.get(f"{server.url}/metrics").text
    return int(float(re.search(r"aborted_requests_total\{\S*client_left\S*\} (\S+)", metrics)[1]))


@pytest.mark.parametrize("stream", [True, False])
def test_two_hundred_clients_that_leave_hold_nothing(fake_server, stream):
    """Left alone, their requests would run for half an hour."""
    chance = random.Random(0)
    body = {"model": "fake", "prompt": SLOW, "max_tokens": 100_000, "context_overflow": "slide", "stream": stream}
    before = num_left(fake_server)
    for _ in range(200):
        post_and_leave(fake_server, body, after_s=chance.choice([0, 0, 0.001, 0.005, 0.03]))
    wait_until_idle(fake_server)
    assert num_left(fake_server) - before > 20, "hardly any of them had begun"


@pytest.mark.parametrize("stream", [True, False])
def test_clients_of_the_demo_model_that_leave_hold_nothing(demo_server, stream):
    body = {"model": "SmolLM2-135M-Instruct", "prompt": "Once upon a time", "max_tokens": 2000, "stream": stream}
    for i in range(20):
        post_and_leave(demo_server, body | {"ignore_eos": True}, after_s=0.05 * (i % 4))
    wait_until_idle(demo_server, limit_s=15)


def test_half_a_request_is_no_request(fake_server):
    before = fake_server.metric("vllm:generation_tokens_total")
    with socket.create_connection(("127.0.0.1", fake_server.port)) as connection:
        connection.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{"model"')
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1000) == b""
    assert httpx.get(f"{fake_server.url}/health").status_code == 200
    assert fake_server.metric("vllm:generation_tokens_total") == before and "Traceback" not in fake_server.log()


def slow_stream(server: ServerProcess, max_tokens: int):
    body = {"model": "fake", "prompt": SLOW, "max_tokens": max_tokens, "stream": True}
    return httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30)


@pytest.mark.parametrize("cause", ["killed", "failing step"])
def test_a_dead_engine_ends_streams_with_an_error_and_then_the_server(fake_model, cause):
    with running(FAKE, "--model", fake_model) as server:
        with slow_stream(server, 2000) as response:
            lines = response.iter_lines()
            next(lines)
            if cause == "killed":
                os.kill(server.engine_pid(), signal.SIGKILL)
            else:
                failed = httpx.post(f"{server.url}/v1/completions", json={"model": "fake", "prompt": CRASH})
                assert failed.status_code == 500
                assert "told to crash" not in failed.text
            died_at_s = time.monotonic()
            *_, last = [line for line in lines if line]
            assert time.monotonic() - died_at_s < 1
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        while (health := httpx.get(f"{server.url}/health")).status_code == 200:
            assert time.monotonic() - died_at_s < 2, "the engine is dead but called healthy"
        assert (health.status_code, health.json()["error"]["message"]) == (503, "The engine process ended.")
        late = httpx.post(f"{server.url}/v1/completions", json={"model": "fake", "prompt": "x"})
        assert late.status_code == 503
        assert server.wait() == 1


def test_ctrl_c_lets_running_requests_finish_and_exits_with_zero(fake_model):
    with running(FAKE, "--model", fake_model) as server:
        engine_pid = server.engine_pid()
        with slow_stream(server, 50) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGINT)
            *_, last = [line for line in lines if line]
        assert last == "data: [DONE]"
        assert server.wait() == 0
        with pytest.raises(ProcessLookupError):
            os.kill(engine_pid, 0)
        assert "Traceback" not in server.log()


@pytest.mark.parametrize("how", ["time-out", "second Ctrl-C"])
def test_requests_that_take_too_long_end_with_an_error_and_the_shutdown_goes_on(fake_model, how):
    with running(FAKE, "--model", fake_model, "--shutdown-timeout", "1" if how == "time-out" else "60") as server:
        with slow_stream(server, 2000) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGINT)
            if how == "second Ctrl-C":
                time.sleep(0.3)
                server.process.send_signal(signal.SIGINT)
            *_, last = [line for line in lines if line]
        assert "shut down" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert server.wait(5) == 0
        assert "Traceback" not in server.log()
