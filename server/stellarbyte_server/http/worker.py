"""One of several HTTP processes: serves on a socket and engines owned by its parent (supervisor.py).

Run as `python -m stellarbyte_server.http.worker`. It reads one `WorkerStart` as a line of JSON from its stdin and
answers with one `WorkerReady` or `WorkerFailed` on its stdout. Further lines are news. It ends when its stdin is
closed.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from stellarbyte_server.access.keys import Keyring
from stellarbyte_server.client.replicas.replicas import Replicas
from stellarbyte_server.client.restart import AttachedEngine
from stellarbyte_server.http.listeners import Listeners
from stellarbyte_server.http.serving import serve  # imports all modules of HTTP while the engine loads its model
from stellarbyte_server.http.worker_protocol import NewKeys, News, WorkerFailed, WorkerReady, WorkerStart
from stellarbyte_server.logs import configure_logging


def main() -> int:
    """Run a worker; returns its exit status."""
    lines = _lines_of_stdin()
    line = next(lines, None)
    if line is None:
        return 0  # the parent ended first
    start = msgspec.json.decode(line, type=WorkerStart)
    if start.settings.keys is not None:
        signal.signal(
            signal.SIGHUP, signal.SIG_IGN
        )  # the parent reads the file, so that all workers have the same keys
    configure_logging(start.settings.log_level, f"http-{start.number}", start.settings.log_format)
    try:
        return asyncio.run(_serve(start, lines))
    except (ValueError, OSError) as error:
        _report(WorkerFailed(str(error)))
        return 1


async def _serve(start: WorkerStart, lines: Iterator[bytes]) -> int:
    """Serve HTTP and apply the parent's news."""
    loop = asyncio.get_running_loop()
    keyring = Keyring(start.settings, start.keys)
    engines = [AttachedEngine(engine.info, engine.endpoint, engine.so_far) for engine in start.engines]
    client = Replicas(engines, Path(start.folder), past=[engine.past for engine in start.engines])

    def hear(news: News) -> None:
        if isinstance(news, NewKeys):
            keyring.replace(news.keys)
        else:
            engines[news.replica].hear(news)

    def pass_on(news: News) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed at shutdown
            loop.call_soon_threadsafe(hear, news)

    threading.Thread(target=_listen_to_parent, args=(lines, pass_on), daemon=True).start()
    admin = None if start.admin_fd is None else socket.socket(fileno=start.admin_fd)
    with contextlib.closing(Listeners(socket.socket(fileno=start.listener_fd), admin)) as listeners:
        return await serve(start.settings, keyring, listeners, client, start.started_at, lambda: _report(WorkerReady()))


def _report(state: WorkerReady | WorkerFailed) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(state) + b"\n")
    sys.stdout.buffer.flush()


def _lines_of_stdin() -> Iterator[bytes]:
    """Lines of stdin, not through sys.stdin, whose lock would be held at the interpreter's exit."""
    rest = b""
    while content := os.read(0, 65536):
        *lines, rest = (rest + content).split(b"\n")
        yield from lines


def _listen_to_parent(lines: Iterator[bytes], pass_on: Callable[[News], None]) -> None:
    """Read news until the end of stdin, then end this process: the engine ends with the parent."""
    for line in lines:
        pass_on(msgspec.json.decode(line, type=News))
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
