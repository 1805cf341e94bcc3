"""Clients that leave free what their requests held."""

import json
import random
import re
import socket
import time

import httpx
import pytest

from tests.support.over_http import wait_until_idle
from tests.support.servers.fake_engine import SLOW
from tests.support.servers.server_process import ServerProcess


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
