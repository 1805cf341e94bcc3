"""Clients that read a byte a second hold up nobody else, and are cut off at the time-out.

What another client measures between its tokens is shown with -s.
"""

import contextlib
import itertools
import json
import socket
import statistics
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.server_process import REAL, ServerProcess, running

NUM_SLOW = 16
SEND_TIMEOUT_S = 4
MAX_HELD_BYTES = 2**19  # 64 KiB in the server, 128 in its kernel, the client's buffer, and one piece of the answer
NUM_EVENTS = 300
NOISE_MS = 50  # of a loaded machine
CUT_LIMIT_S = 30  # after the time-out; a loaded machine takes its time to fill what holds the answers
ENDLESS = {"max_tokens": 10**9, "context_overflow": "slide", "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def server(tiny_model: str) -> Iterator[ServerProcess]:
    with running(REAL, "--model", tiny_model, "--send-timeout", str(SEND_TIMEOUT_S)) as process:
        yield process


def begin(server: ServerProcess, number: int, receive_buffer: int = 2**20) -> socket.socket:
    """A stream without end, of large events."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", server.port))
    body = json.dumps({"model": "tiny", "prompt": [5, number], "logprobs": 5, **ENDLESS})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall((head + body).encode())
    return connection


def gaps_s(server: ServerProcess, num_events: int) -> list[float]:
    """Between the events of one stream that is read as it comes."""
    times = []
    body = {"model": "tiny", "prompt": [7], **ENDLESS}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if line:
                times.append(time.monotonic())
            if len(times) == num_events:
                break
    return [after - before for before, after in itertools.pairwise(times)]


def read_quickly(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while connection.recv(65536):
            pass


def p95_beside(server: ServerProcess, connections: list[socket.socket]) -> float:
    """Milliseconds between the tokens of a stream that is read as it comes, while other clients have theirs."""
    p95_ms = 1000 * statistics.quantiles(gaps_s(server, NUM_EVENTS), n=20)[-1]
    for connection in connections:
        connection.close()
    return p95_ms


def wait_until_idle(server: ServerProcess, limit_s: float) -> None:
    deadline_s = time.monotonic() + limit_s
    while server.metric("vllm:num_requests_running") or server.metric("vllm:kv_cache_usage_perc"):
        assert time.monotonic() < deadline_s, "requests of slow readers are still running"
        time.sleep(0.2)


def test_slow_readers_are_cut_off(server: ServerProcess) -> None:
    slow = [begin(server, number, receive_buffer=4096) for number in range(NUM_SLOW)]
    is_over = threading.Event()

    def read_slowly() -> None:
        while not is_over.wait(1):
            for connection in slow:
                with contextlib.suppress(OSError):
                    connection.recv(1)

    reader = threading.Thread(target=read_slowly)
    reader.start()
    try:
        wait_until_idle(server, SEND_TIMEOUT_S + CUT_LIMIT_S)
    finally:
        is_over.set()
        reader.join()
    assert server.log().count(f"cut off a client that did not read for {SEND_TIMEOUT_S} s") == NUM_SLOW
    for connection in slow:  # what was on its way comes, then a reset: no end that looks like one
        connection.settimeout(10)
        received = b""
        with pytest.raises(ConnectionResetError):
            while piece := connection.recv(65536):
                received += piece
        assert b"[DONE]" not in received and len(received) < MAX_HELD_BYTES
        connection.close()


def test_slow_readers_slow_nobody_down(server: ServerProcess) -> None:
    """Beside as many who read quickly, since the engine works for all of them."""
    quick = [begin(server, number) for number in range(NUM_SLOW)]
    readers = [threading.Thread(target=read_quickly, args=[connection]) for connection in quick]
    for reader in readers:
        reader.start()
    beside_quick_ms = p95_beside(server, quick)
    wait_until_idle(server, 10)
    beside_slow_ms = p95_beside(server, [begin(server, number, receive_buffer=4096) for number in range(NUM_SLOW)])
    print(f"\n95th percentile of gaps: {beside_quick_ms:.1f} ms beside quick readers, {beside_slow_ms:.1f} beside slow")
    assert beside_slow_ms <= 2 * beside_quick_ms + NOISE_MS
