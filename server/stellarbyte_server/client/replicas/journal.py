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
    pinned: bool = False


class _Content(msgspec.Struct, frozen=True, kw_only=True):
    entries: dict[str, JournalEntry] = {}
    joined: dict[int, str] = {}


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
        return self._read().entries

    def note(self, name: str, entry: JournalEntry) -> None:
        """Change what a name means, whole or not at all."""
        content = self._read()
        self._write(msgspec.structs.replace(content, entries=content.entries | {name: entry}))

    def forget(self, name: str) -> None:
        """Note that the journal does not say what a name means: --data-dir does."""
        content = self._read()
        if name in content.entries:
            rest = {other: entry for other, entry in content.entries.items() if other != name}
            self._write(msgspec.structs.replace(content, entries=rest))

    def joined(self) -> dict[int, str]:
        """The newest process of each replica that has got the adapters, by its endpoint."""
        return self._read().joined

    def note_joined(self, replica: int, endpoint: str) -> None:
        content = self._read()
        if content.joined.get(replica) != endpoint:
            self._write(msgspec.structs.replace(content, joined=content.joined | {replica: endpoint}))

    def _read(self) -> _Content:
        try:
            return msgspec.json.decode((self._folder / "adapters.json").read_bytes(), type=_Content)
        except FileNotFoundError:
            return _Content()

    def _write(self, content: _Content) -> None:
        file = self._folder / "adapters.json"
        new = file.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(content))
        os.replace(new, file)
