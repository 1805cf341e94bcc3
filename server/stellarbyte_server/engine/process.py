"""The engine process: builds the core, then serves HTTP processes until it fails or its parent ends.

Run as `python -m stellarbyte_server.engine.process` by `launch.EngineProcess`. One thread runs steps; a second one
waits for the end of stdin, which means that the parent has ended, and ends the process: an engine never outlives its
parent.
"""

import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import BinaryIO

import msgspec
import zmq

from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.loop import Core, EngineLoop
from stellarbyte_server.garbage import keep_for_good
from stellarbyte_server.logs import configure_logging
from stellarbyte_server.protocol.adapter_versions import RecordedAdapters, RestoreAdapters
from stellarbyte_server.protocol.messages import EngineInfo
from stellarbyte_server.protocol.start import EngineFailed, EngineReady, EngineStart

logger = logging.getLogger("server.engine")

SEND_QUEUE_MESSAGES = 10_000  # queue for an HTTP process that does not read
LINGER_MS = 1000  # time to send the last messages when the process ends

BuildCore = Callable[[EngineSettings], tuple[Core, EngineInfo]]


def _build_core(settings: EngineSettings) -> tuple[Core, EngineInfo]:
    from stellarbyte_server.engine.start.load import build_core  # imports torch: only after the parent is watched

    return build_core(settings)


def _end_with_parent(folders: Sequence[str]) -> None:
    """Wait for the end of stdin, then end this process at once."""
    while os.read(0, 4096):  # not through sys.stdin, whose lock would be held at the interpreter's exit
        pass
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _keep_stdout() -> BinaryIO:
    """Reserve stdout for the line to the parent; other output goes to stderr."""
    kept = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return kept


def _report(stdout: BinaryIO, state: EngineReady | EngineFailed) -> None:
    stdout.write(msgspec.json.encode(state) + b"\n")
    stdout.flush()


def main(build_core: BuildCore = _build_core) -> int:
    """Run the engine process; returns its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which lets requests finish
    stdout = _keep_stdout()
    line = sys.stdin.buffer.readline()
    if not line:
        return 0  # the parent ended first
    start = msgspec.json.decode(line, type=EngineStart)
    configure_logging(start.log_level, start.process_name, start.log_format, is_stdout_free=True)
    threading.Thread(target=_end_with_parent, args=(start.folders,), daemon=True).start()
    try:
        core, info = build_core(start.settings)
    except Exception as error:
        logger.debug("could not start", exc_info=True)
        _report(stdout, EngineFailed(_one_line(error)))
        return 1
    if start.recorded != RecordedAdapters():
        core.call(RestoreAdapters("", start.recorded))
    keep_for_good()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, SEND_QUEUE_MESSAGES)
    socket.bind(start.endpoint)
    _report(stdout, EngineReady(info))
    with contextlib.closing(stdout):  # open until the end, which the parent detects by it
        try:
            EngineLoop(core, socket).run()
        except Exception:
            logger.exception("a step failed; the engine ends")
        context.destroy(linger=LINGER_MS)
    logging.shutdown()
    os._exit(1)  # at once: other threads may wait for a lost device


def _one_line(error: Exception) -> str:
    """An exception as one line for the user: its own sentence if it has one, else with its type."""
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError) and text:
        return text
    return f"the engine could not start: {type(error).__name__}: {text}".rstrip(": ")


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    os._exit(status)  # at once: a thread may still wait for a rank that did not start
