"""The adapters that were loaded and unloaded over HTTP, in a file that all HTTP processes of a server share.

What it says is what every replica has to have: it changes after all replicas have read an adapter and before the first
of them uses it. So a process that ends in between leaves a change that is made nowhere, or that others complete.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from filelock import FileLock


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
        lock = FileLock(self._folder / "adapters.lock", thread_local=False)  # a new one: each excludes all others
        acquiring = asyncio.ensure_future(asyncio.to_thread(lock.acquire, poll_interval=0.01))
        try:
            await asyncio.shield(acquiring)
            yield
        finally:
            acquiring.add_done_callback(lambda _: lock.release())  # at once, or when the thread has got it

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
