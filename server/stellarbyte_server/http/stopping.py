"""Stop signals of the server's processes, and time limits of a shutdown."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable

DEAD_ENGINE_GRACE_S = 5.0  # time in which /health reports the reason, before an HTTP process ends
LAST_WORDS_S = 1.0  # time for streams to send their error at shutdown
SHUTTING_DOWN = "The server shut down before the answer was complete."


def on_stop_signals(handler: "Callable[..., None] | signal.Handlers") -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def call_on_stop_signals(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Let `loop` call `call` on every stop signal. Unlike the loop's own handlers these stay when it is closed."""

    def handle(*_: object) -> None:
        with contextlib.suppress(RuntimeError):  # closed at shutdown
            loop.call_soon_threadsafe(call)

    on_stop_signals(handle)


def exit_quietly(*_: object) -> None:
    """Exit at once during a start: an exception could be swallowed by a running import.

    Child processes see the end of their stdin, clean up and exit.
    """
    os._exit(0)
