"""A pipe by which other threads wake the one that polls it."""

import contextlib
import os
import threading


class WakeUp:
    """Open until `close`, or until nothing refers to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_closed = True  # until there is a pipe
        self.fd, self._writing_fd = os.pipe()
        """Readable from `ring` until `clear`."""
        self._is_closed = False
        os.set_blocking(self.fd, False)
        os.set_blocking(self._writing_fd, False)

    def ring(self) -> None:
        """For any thread; without effect once it is closed."""
        with self._lock:  # or the number could be another file's by now
            if not self._is_closed:
                with contextlib.suppress(BlockingIOError):  # full: a wake-up is pending
                    os.write(self._writing_fd, b"\0")

    def clear(self) -> None:
        """For the thread that polls; without effect once it is closed."""
        with self._lock:
            if not self._is_closed:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.fd, 4096)

    def close(self) -> None:
        """May be called again."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                os.close(self.fd)
                os.close(self._writing_fd)

    def __del__(self) -> None:
        self.close()
