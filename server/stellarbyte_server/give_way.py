"""How threads beside the engine's own leave the cores to it."""

import contextlib
import os
import threading

NICENESS = 3


def give_way() -> None:
    """On Linux niceness belongs to the thread that sets it, elsewhere to the process: there it is left alone."""
    if os.uname().sysname == "Linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):  # it is nicer already, or may not be
            os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
