"""One of several HTTP processes: serves on a socket and an engine that its parent (supervisor.py) owns.

Run as `python -m server.http_worker`. It reads one `WorkerStart` as a line of JSON from its stdin and answers with one
`WorkerReady` or `WorkerFailed` on its stdout. It lives at most as long as its stdin is open.
"""

import asyncio
import os
import socket
import sys
import threading

import msgspec

from server.engine.launch import AttachedEngine
from server.logs import configure_logging
from server.serving import serve  # imports all that HTTP needs, while the engine loads its model
from server.worker_protocol import WorkerFailed, WorkerReady, WorkerStart


def main() -> int:
    """The whole life of a worker; returns its exit status."""
    line = sys.stdin.buffer.readline()
    if not line:
        return 0  # the parent ended first
    start = msgspec.json.decode(line, type=WorkerStart)
    configure_logging(start.settings.log_level, f"http-{start.number}")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    engine = AttachedEngine(start.info, start.endpoint, start.engine_end_fd)
    with socket.socket(fileno=start.listener_fd) as listener:
        try:
            return asyncio.run(
                serve(start.settings, listener, engine, start.started_at, lambda: _report(WorkerReady()))
            )
        except (ValueError, OSError) as error:
            _report(WorkerFailed(str(error)))
            return 1


def _report(state: WorkerReady | WorkerFailed) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(state) + b"\n")
    sys.stdout.buffer.flush()


def _end_with_parent() -> None:
    """Wait for the end of stdin, then end this process: without the parent there is no engine either."""
    while os.read(0, 4096):  # not through sys.stdin: its lock would be held when the interpreter ends
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
