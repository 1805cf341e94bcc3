"""The adapters that were loaded and unloaded over HTTP, in a file that all HTTP processes of a server share.

What it says is what every replica has to have: it changes after all replicas have read an adapter and before the first
of them uses it. So a process that ends in between leaves a change that is made nowhere, or that others complete.
"""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

_POLL_S = 0.01


class JournalEntry(msgspec.Struct, frozen=True):
    """What a name means since its last change."""

    path: str = ""  # as given in the call that loaded it
    content_hash: str = ""  # "": unloaded


class AdapterJournal:
    """Called with the lock held, but for `locked`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """One change at a time, over all HTTP processes; the lock of a process ends with it."""
        with open(self._folder / "adapters.lock", "wb") as file:  # whose lock excludes those of other openings
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    await asyncio.sleep(_POLL_S)
                else:
                    break
            yield

    def read(self) -> dict[str, JournalEntry]:
        try:
            content = (self._folder / "adapters.json").read_bytes()
        except FileNotFoundError:
            return {}
        return msgspec.json.decode(content, type=dict[str, JournalEntry])

    def note(self, name: str, entry: JournalEntry) -> None:
        """Change what a name means, whole or not at all."""
        file = self._folder / "adapters.json"
        new = file.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(self.read() | {name: entry}))
        os.replace(new, file)
