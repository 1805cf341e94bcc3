"""Throughput of the path engine → ZeroMQ → HTTP process → socket, without a model.

    python -m benchmarks.http_path                     64 and 256 streams, each at 25,600, 51,200 and 102,400 tokens/s
    python -m benchmarks.http_path --http-workers 2

The engine is `instant_engine` at a pace of (tokens/s ÷ streams) steps a second, the HTTP processes are the real ones,
the client is this process. A late reader gets several tokens in one event, so tokens and events are counted
separately. The age of every token on arrival shows whether the server keeps up: if not, ages grow. Counted from when
all streams have begun until the first one ends.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.support.instant_engine import make_model_folder
from benchmarks.support.record import ROOT, write_result

START_LIMIT_S = 60
KEEPS_UP_MS = 100  # limit of the 99th percentile of a token's age
_TEXT = re.compile(rb'"text":"([^"]+)"')


class _Reader(asyncio.Protocol):
    """Sends one request and records its events. Parses little, as it shares the machine with the server."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._rest = b""
        self.done = asyncio.get_running_loop().create_future()
        self.events: list[tuple[int, bytes]] = []  # (arrival in µs, the times of its tokens' steps)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now_us = time.monotonic_ns() // 1000
        whole, separator, self._rest = (self._rest + data).rpartition(b"\n\n")
        self.events += [(now_us, text) for text in _TEXT.findall(whole + separator)]
        if b"[DONE]" in whole and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, _: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError("a stream ended early"))


def _request(steps_per_s: int, num_tokens: int) -> bytes:
    body = {"model": "instant", "prompt": [steps_per_s], "max_tokens": num_tokens, "stream": True}
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def _read_streams(port: int, num_streams: int, steps_per_s: int, num_tokens: int) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    request = _request(steps_per_s, num_tokens)
    connections = await asyncio.gather(
        *(loop.create_connection(lambda: _Reader(request), "127.0.0.1", port) for _ in range(num_streams))
    )
    readers = [reader for _, reader in connections]
    await asyncio.gather(*(reader.done for reader in readers))
    for transport, _ in connections:
        transport.close()
    return _figures([reader.events for reader in readers], num_tokens)


def _figures(streams: list[list[tuple[int, bytes]]], num_tokens: int) -> dict[str, Any]:
    for events in streams:
        if sum(len(text.split()) for _, text in events) != num_tokens:
            raise SystemExit("a stream has lost tokens")
    begin_us = max(events[0][0] for events in streams)
    end_us = min(events[-1][0] for events in streams)
    steady = [(at_us, text) for events in streams for at_us, text in events if begin_us < at_us <= end_us]
    ages_ms = sorted((at_us - int(stamp)) / 1000 for at_us, text in steady for stamp in text.split())
    seconds = (end_us - begin_us) / 1e6
    return {
        "tokens_per_s": round(len(ages_ms) / seconds),
        "events_per_s": round(len(steady) / seconds),
        "age_ms_p50": round(ages_ms[len(ages_ms) // 2], 2),
        "age_ms_p99": round(ages_ms[int(0.99 * len(ages_ms))], 2),
        "age_ms_max": round(ages_ms[-1], 2),
        "steady_s": round(seconds, 2),
    }


@contextlib.contextmanager
def _server(http_workers: int) -> Iterator[tuple[int, int]]:
    """A running server: its port and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        model = make_model_folder(Path(folder) / "instant")
        flags = ["--model", str(model), "--port", str(port), "--http-workers", str(http_workers)]
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.support.instant_engine", "serve", *flags, "--log-level", "warning"],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if not name.startswith("STELLARBYTE_")},
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait_ready(process, port)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait()


def _wait_ready(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).close()
            return
        time.sleep(0.05)
    raise SystemExit("the server did not start")


def _http_cpu_s(server_pid: int) -> float:
    """CPU seconds the HTTP processes have used: all of the server's but the engine's (Linux)."""
    children = Path(f"/proc/{server_pid}/task/{server_pid}/children").read_text().split()
    is_engine = [b"benchmarks.support.instant_engine" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children]
    pids = [str(server_pid), *(pid for pid, engine in zip(children, is_engine, strict=True) if not engine)]
    stats = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids)
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--http-workers", type=int, default=1)
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--tokens-per-s", type=int, nargs="+", default=[25_600, 51_200, 102_400])
    parser.add_argument("--seconds", type=float, default=5, help="of each run")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    rows = []
    with _server(options.http_workers) as (port, pid):
        for num_streams in options.streams:
            for wanted in options.tokens_per_s:
                steps_per_s = wanted // num_streams
                cpu_s = _http_cpu_s(pid)
                num_tokens = int(options.seconds * steps_per_s)
                figures = asyncio.run(_read_streams(port, num_streams, steps_per_s, num_tokens))
                figures["http_cpu_us_per_token"] = round(
                    (_http_cpu_s(pid) - cpu_s) / (num_streams * num_tokens) * 1e6, 2
                )
                row = {"streams": num_streams, "steps_per_s": steps_per_s, "wanted_tokens_per_s": wanted, **figures}
                row["keeps_up"] = figures["age_ms_p99"] <= KEEPS_UP_MS
                print(json.dumps(row), flush=True)
                rows.append(row)
    if not options.no_record:
        write_result("http_path", {"http_workers": options.http_workers, "runs": rows})


if __name__ == "__main__":
    main()
