"""Lower priority for all threads but the engine's."""

import contextlib
import os
import threading

NICENESS = 3


def give_way() -> None:
    """Lower the calling thread's priority. Only on Linux; elsewhere niceness belongs to the whole process."""
    if os.uname().sysname == "Linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):  # already lower, or not permitted
            os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
