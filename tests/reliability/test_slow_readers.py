"""Clients that read a byte a second hold up nobody else, and are cut off at the time-out.

Figures of another client's stream are shown with -s.
"""

import contextlib
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.support.servers.server_process import REAL, ServerProcess, running

NUM_SLOW = 16
SEND_TIMEOUT_S = 4
QUICK_S = 2.0  # that the neighbour is watched beside quick readers
CUT_OFF_AFTER_S = 2 * SEND_TIMEOUT_S + 4  # it looks once in each time-out; of a machine that is busy with other things
FILL_LIMIT_S = 120  # until what holds answers is full and all are cut off
MAX_GROWTH_BYTES = 16 * 2**20  # of the HTTP process, while answers wait for NUM_SLOW clients
MAX_KERNEL_BYTES = 2**18
MAX_GAP_S = 0.75 * SEND_TIMEOUT_S  # less than a slow reader could hold up the others, more than a busy machine does
MIN_SHARE = 0.2  # of the pace beside as many quick readers
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


@dataclass
class Neighbour:
    """A stream without end that is read as it comes, on a thread of its own."""

    server: ServerProcess
    times_s: list[float] = field(default_factory=list)  # of its events

    def __enter__(self) -> "Neighbour":
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        wait_until(lambda: len(self.times_s) > 0, 30, "the neighbour gets an answer")
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _read(self) -> None:
        body = {"model": "tiny", "prompt": [7], **ENDLESS}
        with httpx.stream("POST", f"{self.server.url}/v1/completions", json=body, timeout=60) as response:
            for line in response.iter_lines():
                if line:
                    self.times_s.append(time.monotonic())
                if self._is_over.is_set():
                    return

    def watch(self, began_s: float) -> tuple[float, float]:
        """Since then: events a second, and the longest time without one."""
        now_s = time.monotonic()
        times_s = [began_s, *(at_s for at_s in list(self.times_s) if at_s > began_s), now_s]
        gaps_s = [after - before for before, after in itertools.pairwise(times_s)]
        return (len(times_s) - 2) / (now_s - began_s), max(gaps_s)


class Readers:
    """Threads that read connections."""

    def __init__(self, connections: list[socket.socket], num_bytes: int, pause_s: float) -> None:
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._read, args=(one, num_bytes, pause_s)) for one in connections]
        for thread in self._threads:
            thread.start()

    def _read(self, connection: socket.socket, num_bytes: int, pause_s: float) -> None:
        with contextlib.suppress(OSError):
            while not self._is_over.wait(pause_s):
                connection.recv(num_bytes)

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


@dataclass
class Backlog:
    """What the server's kernel keeps for a client."""

    most_bytes: int = 0
    num_bytes: int = -1
    changed_at_s: float = 0.0  # last
    gone_at_s: float = 0.0  # when the connection was cut off

    def note(self, num_bytes: int, began_s: float) -> None:
        now_s = time.monotonic()
        if num_bytes != self.num_bytes:
            self.num_bytes, self.changed_at_s = num_bytes, now_s
        self.most_bytes = max(self.most_bytes, num_bytes)
        filled_s = self.changed_at_s - began_s  # the process, which holds less, takes less to be full as well
        assert now_s - self.changed_at_s < filled_s + CUT_OFF_AFTER_S, "a client that does not read is kept"


def unsent_bytes(server: ServerProcess) -> dict[int, int]:
    """Of the server's connections, by the client's port."""
    found = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, here, there, state, queues, *_ = line.split()
        if state == "01" and int(here.partition(":")[2], 16) == server.port:
            found[int(there.partition(":")[2], 16)] = int(queues.partition(":")[0], 16)
    return found


def until_all_are_cut_off(server: ServerProcess, connections: list[socket.socket]) -> list[Backlog]:
    backlogs = {connection.getsockname()[1]: Backlog() for connection in connections}
    began_s = time.monotonic()
    while not all(backlog.gone_at_s for backlog in backlogs.values()):
        unsent = unsent_bytes(server)
        for port, backlog in backlogs.items():
            if port in unsent:
                backlog.note(unsent[port], began_s)
            elif not backlog.gone_at_s:
                backlog.gone_at_s = time.monotonic()
        assert time.monotonic() - began_s < FILL_LIMIT_S, backlogs
        time.sleep(0.05)
    return list(backlogs.values())


def wait_until(condition, limit_s: float, what: str) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not after {limit_s:.0f} s: {what}"
        time.sleep(0.05)


def memory(server: ServerProcess, name: str) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024


def num_cut(server: ServerProcess) -> int:
    return server.log().count(f"disconnected a client that did not read for {SEND_TIMEOUT_S} s")


@pytest.mark.slow
def test_slow_readers_are_cut_off_and_slow_nobody_down(server: ServerProcess) -> None:
    """The neighbour's pace is compared with that beside as many quick readers, since the engine works for all."""
    with Neighbour(server) as neighbour:
        quick = [begin(server, number) for number in range(NUM_SLOW)]
        began_s = time.monotonic()
        readers = Readers(quick, 65536, 0)
        time.sleep(QUICK_S)
        quick_pace, quick_gap_s = neighbour.watch(began_s)
        readers.stop()
        for connection in quick:
            connection.close()
        wait_until(lambda: server.metric("vllm:num_requests_running") == 1, 10, "quick readers' requests are over")

        Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # from now on VmHWM is the most since
        resident = memory(server, "VmRSS")
        slow = [begin(server, number, receive_buffer=4096) for number in range(NUM_SLOW)]
        began_s = time.monotonic()
        readers = Readers(slow, 1, 1)
        backlogs = until_all_are_cut_off(server, slow)
        pace, gap_s = neighbour.watch(began_s)
        growth = memory(server, "VmHWM") - resident
        wait_until(lambda: server.metric("vllm:num_requests_running") == 1, 5, "slow readers' requests are over")
        readers.stop()
    waited_s = [backlog.gone_at_s - backlog.changed_at_s for backlog in backlogs]
    most_bytes = max(backlog.most_bytes for backlog in backlogs)
    print(
        f"\nbeside quick readers {quick_pace:.0f} events a second, {1000 * quick_gap_s:.0f} ms at most between two;"
        f" beside slow ones {pace:.0f}, {1000 * gap_s:.0f} ms; cut off {min(waited_s):.1f} to {max(waited_s):.1f} s"
        f" after the last byte; {growth / 2**20:+.1f} MiB in the process,"
        f" {most_bytes / 2**10:.0f} KiB each in the kernel"
    )
    assert pace > MIN_SHARE * quick_pace and gap_s < MAX_GAP_S
    assert min(waited_s) > SEND_TIMEOUT_S - 0.5, "cut off before the time-out"
    assert num_cut(server) == NUM_SLOW
    assert growth < MAX_GROWTH_BYTES and most_bytes <= MAX_KERNEL_BYTES
    for connection in slow:  # what was on its way comes, then a reset: no end that looks like one
        connection.settimeout(10)
        received = b""
        with pytest.raises(ConnectionResetError):
            while piece := connection.recv(65536):
                received += piece
        assert received and b"[DONE]" not in received
        connection.close()
    wait_until(lambda: server.metric("vllm:kv_cache_usage_perc") == 0, 10, "all is free")
