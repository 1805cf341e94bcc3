"""One of several HTTP processes: serves on a socket and an engine that its parent (supervisor.py) owns.

Run as `python -m server.http_worker`. It reads one `WorkerStart` as a line of JSON from its stdin and answers with one
`WorkerReady` or `WorkerFailed` on its stdout. Further lines bring new keys. It lives at most as long as its stdin is
open.
"""

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

import msgspec

from server.engine.launch import AttachedEngine
from server.keys import Key, Keyring
from server.logs import configure_logging
from server.serving import serve  # imports all that HTTP needs, while the engine loads its model
from server.worker_protocol import WorkerFailed, WorkerReady, WorkerStart


def main() -> int:
    """The whole life of a worker; returns its exit status."""
    lines = _lines_of_stdin()
    line = next(lines, None)
    if line is None:
        return 0  # the parent ended first
    start = msgspec.json.decode(line, type=WorkerStart)
    if start.settings.keys is not None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the parent reads the file, so that all have the same keys
    configure_logging(start.settings.log_level, f"http-{start.number}")
    keyring = Keyring(start.settings, start.keys)
    threading.Thread(target=_listen_to_parent, args=(lines, keyring), daemon=True).start()
    engine = AttachedEngine(start.info, start.endpoint, start.engine_end_fd)
    with socket.socket(fileno=start.listener_fd) as listener:
        try:
            return asyncio.run(
                serve(start.settings, keyring, listener, engine, start.started_at, lambda: _report(WorkerReady()))
            )
        except (ValueError, OSError) as error:
            _report(WorkerFailed(str(error)))
            return 1


def _report(state: WorkerReady | WorkerFailed) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(state) + b"\n")
    sys.stdout.buffer.flush()


def _lines_of_stdin() -> Iterator[bytes]:
    """Not through sys.stdin, whose lock would be held when the interpreter ends."""
    rest = b""
    while content := os.read(0, 65536):
        *lines, rest = (rest + content).split(b"\n")
        yield from lines


def _listen_to_parent(lines: Iterator[bytes], keyring: Keyring) -> None:
    """Take new keys until the end of stdin, then end this process: without the parent there is no engine either."""
    for line in lines:
        keyring.replace(msgspec.json.decode(line, type=tuple[Key, ...]))
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
