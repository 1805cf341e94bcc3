"""How the server's processes are told to stop and how long that may take."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable

DEAD_ENGINE_GRACE_S = 5.0  # how long /health says why, before an HTTP process ends
LAST_WORDS_S = 1.0  # time for streams to send their error when they are cut off
SHUTTING_DOWN = "The server shut down before the answer was complete."


def on_stop_signals(handler: "Callable[..., None] | signal.Handlers") -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def call_on_stop_signals(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Let `loop` call something on every signal. Unlike the loop's own handlers these stay when it is closed."""

    def handle(*_: object) -> None:
        with contextlib.suppress(RuntimeError):  # it is closed: everything ends already
            loop.call_soon_threadsafe(call)

    on_stop_signals(handle)


def exit_quietly(*_: object) -> None:
    """Ends a start that takes too long for the user, at once: an exception could get lost in an import under way.

    The processes that were started see the end of their stdin, clean up and end as well.
    """
    os._exit(0)
