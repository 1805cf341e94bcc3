"""The engine processes that have the adapters of the record, in a file that all HTTP processes of a server share.

An HTTP process hears of a new engine process later than another one that may send it requests already. So a change
waits until it has heard of all processes in this file, and the lock keeps a process that joins apart from changes.
"""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

_POLL_S = 0.01


class JoinedEngines:
    """Called with the lock held, but for `locked`."""

    def __init__(self, folder: Path) -> None:
        """`folder`: private to the server."""
        self._file = folder / "joined.json"
        self._lock = folder / "joined.lock"

    @contextlib.asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """One at a time, over all HTTP processes; the lock of a process ends with it."""
        with open(self._lock, "wb") as file:  # whose lock excludes those of other openings
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    await asyncio.sleep(_POLL_S)
                else:
                    break
            yield

    def read(self) -> dict[int, str]:
        """The newest process of each replica, by its endpoint."""
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=dict[int, str])
        except FileNotFoundError:
            return {}

    def note(self, replica: int, endpoint: str) -> None:
        joined = self.read()
        if joined.get(replica) != endpoint:
            new = self._file.with_suffix(".new")
            new.write_bytes(msgspec.json.encode(joined | {replica: endpoint}))
            os.replace(new, self._file)
