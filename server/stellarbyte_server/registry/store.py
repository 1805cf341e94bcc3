"""The record of adapters: the folder adapters/ of --data-dir, or of the server's own folder, which ends with it.

    contents/ID/     adapter_config.json and adapter_model.safetensors of one version, written once
    names/ID.json    the record of a name; the only list of existing versions
    withdrawn/ID     names of --adapter-dir and --lora-modules that were unloaded; emptied at the start, like the next
    staged/ID        files that are being written
    locks/           one change of a name at a time (see sources/reservation.py)

Each change is whole or absent after a crash: a content is synced to the disk before a record names it, and a record
takes effect by a rename. Names of files are made here, and no link below adapters/ is followed.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec

from stellarbyte_server.opening import open_inside
from stellarbyte_server.protocol.adapter_versions import (
    AdapterLocated,
    RecordedAdapters,
    RestoredAdapter,
    StoredAdapter,
)
from stellarbyte_server.registry.record import NameRecord, Version

logger = logging.getLogger("server.registry")

FILES = CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PLACES = ("contents", "names", "withdrawn", "staged", "locks")
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_ID = re.compile(r"[0-9a-f]{32}")
_CHUNK_BYTES = 1 << 20


class Content(msgspec.Struct, frozen=True, kw_only=True):
    """A stored copy of an adapter's files."""

    folder: str
    file_hashes: tuple[str, str]
    source: str


class AdapterRegistry:
    """One process's view of the folder. Any thread; every method may block on the disk and raises OSError."""

    def __init__(self, folder: str | Path, history: int, *, is_durable: bool = True) -> None:
        """Open its folder in `folder`, and make what is missing of it; unless `is_durable`, a crash may lose it."""
        self.history = history
        self.is_durable = is_durable
        self._path = Path(folder).resolve() / "adapters"
        self._path.mkdir(mode=0o700, exist_ok=True)
        root = os.open(self._path, _FOLDER_FLAGS)
        try:
            for place in _PLACES:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(place, 0o700, dir_fd=root)
            self._folders = {place: os.open(place, _FOLDER_FLAGS, dir_fd=root) for place in _PLACES}
        finally:
            os.close(root)

    @property
    def locks(self) -> Path:
        return self._path / "locks"

    def close(self) -> None:
        for folder in self._folders.values():
            os.close(folder)

    # Contents

    def keep(self, located: AdapterLocated) -> Content:
        """Copy an adapter's files, durably."""
        folder = secrets.token_hex(16)
        os.mkdir(folder, 0o700, dir_fd=self._folders["contents"])
        try:
            at = os.open(folder, _FOLDER_FLAGS, dir_fd=self._folders["contents"])
            try:
                root = Path(located.root)
                hashes = tuple(
                    self._copy(root, path, name, at)
                    for path, name in zip((located.config, located.weights), FILES, strict=True)
                )
                self._sync(at)
            finally:
                os.close(at)
            self._sync(self._folders["contents"])
        except OSError:
            self.discard(folder)
            raise
        return Content(folder=folder, file_hashes=(hashes[0], hashes[1]), source=located.shown)

    def discard(self, folder: str) -> None:
        """Remove a content that no record names."""
        contents = self._folders["contents"]
        with contextlib.suppress(FileNotFoundError):
            at = os.open(folder, _FOLDER_FLAGS, dir_fd=contents)
            try:
                for name in os.listdir(at):
                    os.unlink(name, dir_fd=at)
            finally:
                os.close(at)
            os.rmdir(folder, dir_fd=contents)

    def discard_unnamed(self, name: str, folder: str) -> None:
        """Remove a content unless the record of its name has it."""
        record = self.record(name)
        if record is None or folder not in [version.folder for version in record.versions]:
            self.discard(folder)

    def stored(self, version: Version) -> StoredAdapter:
        folder = str(self._path / "contents" / version.folder)
        return StoredAdapter(
            folder=folder,
            root=version.source,
            content_hash=version.content_hash,
            rank=version.rank,
            num_bytes=version.num_bytes,
            invocation=version.invocation,
        )

    def stored_content(self, content: Content) -> StoredAdapter:
        """A content that has not been read yet."""
        return StoredAdapter(folder=str(self._path / "contents" / content.folder), root=content.source)

    # Records

    def record(self, name: str) -> NameRecord | None:
        """The record of a name; None if there is none, or none that can be read."""
        try:
            return self._read(_file_of(name))
        except FileNotFoundError:
            return None
        except ValueError:
            return None  # as logged at the start

    def write(self, record: NameRecord) -> None:
        """Put a record in place of that of its name, durably."""
        self._put("names", record.name, msgspec.json.encode(record))
        with contextlib.suppress(OSError):  # the record counts
            self._unlink("withdrawn", record.name)

    def remove(self, name: str) -> None:
        """Remove the record of a name, durably; its contents stay until `discard`, or the next start."""
        self._unlink("names", name)

    def withdraw(self, name: str) -> None:
        """Note that a name that engines offer by themselves was unloaded, until a record is written or the server
        ends."""
        self._put("withdrawn", name, msgspec.json.encode(name))

    def _put(self, place: str, name: str, content: bytes) -> None:
        """Put a file in place of that of a name, durably."""
        staged = secrets.token_hex(16)
        file = os.open(staged, _NEW_FLAGS, 0o600, dir_fd=self._folders["staged"])
        try:
            _write_all(file, content)
            self._sync(file)
        finally:
            os.close(file)
        os.replace(staged, _file_of(name), src_dir_fd=self._folders["staged"], dst_dir_fd=self._folders[place])
        self._sync(self._folders[place])

    def _unlink(self, place: str, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_file_of(name), dir_fd=self._folders[place])
            self._sync(self._folders[place])

    def recorded(self) -> RecordedAdapters:
        """All names with their live versions, and those that were withdrawn, for an engine."""
        adapters = self._restored()
        names = {adapter.name for adapter in adapters}
        return RecordedAdapters(adapters=adapters, withdrawn=tuple(sorted(set(self._withdrawn()) - names)))

    def _withdrawn(self) -> Iterator[str]:
        for file in os.listdir(self._folders["withdrawn"]):
            with contextlib.suppress(FileNotFoundError):  # loaded meanwhile
                at = os.open(file, _READ_FLAGS, dir_fd=self._folders["withdrawn"])
                try:
                    yield msgspec.json.decode(b"".join(_chunks(at)), type=str)
                finally:
                    os.close(at)

    def _restored(self) -> tuple[RestoredAdapter, ...]:
        records = sorted((record for _, record in self._records() if record is not None), key=lambda each: each.name)
        return tuple(
            RestoredAdapter(
                name=record.name,
                current=self.stored(record.version(record.current)),
                shares=tuple((self.stored(record.version(number)), share) for number, share in record.shares),
                pinned=record.pinned,
            )
            for record in records
            if self._has_files(record)
        )

    def clean(self) -> None:
        """At the start: remove what an interrupted change left, and log each thing that is left out."""
        for place in ("staged", "withdrawn"):
            for name in os.listdir(self._folders[place]):
                os.unlink(name, dir_fd=self._folders[place])
        used: set[str] = set()
        are_all_known = True
        for file, record in self._records():
            if record is None:
                logger.error("adapters/names/%s is not a record of an adapter; it is left out", file)
                are_all_known = False
                continue
            used |= {version.folder for version in record.versions}
            if damaged := self._damaged(record):
                logger.error(
                    "the stored files of the adapter %s (%s) are damaged; it is left out", record.name, damaged
                )
                self._set_aside(file)
        for folder in os.listdir(self._folders["contents"]):
            if _ID.fullmatch(folder) is None:
                logger.error("adapters/contents/%s is not a stored adapter; it is left out", folder)
            elif are_all_known and folder not in used:
                self.discard(folder)

    def _copy(self, root: Path, path: str, name: str, at: int) -> str:
        """Copy a file inside `root` to a new file in the folder `at`, durably; returns its SHA-256."""
        hasher = hashlib.sha256()
        source = open_inside(root, path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            disk = os.fstatvfs(at)
            if os.fstat(source).st_size > disk.f_bavail * disk.f_frsize:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # before others lack it
            target = os.open(name, _NEW_FLAGS, 0o600, dir_fd=at)
            try:
                for chunk in _chunks(source):
                    hasher.update(chunk)
                    _write_all(target, chunk)
                self._sync(target)
            finally:
                os.close(target)
        finally:
            os.close(source)
        return hasher.hexdigest()

    def _sync(self, file: int) -> None:
        if self.is_durable:
            os.fsync(file)

    def _set_aside(self, file: str) -> None:
        names = self._folders["names"]
        os.replace(file, f"{file}.damaged", src_dir_fd=names, dst_dir_fd=names)

    def _records(self) -> Iterator[tuple[str, NameRecord | None]]:
        """Every file of a record, and the record if it is one."""
        for file in sorted(os.listdir(self._folders["names"])):
            try:
                record = self._read(file)
            except (ValueError, OSError):
                yield file, None
                continue
            yield file, record

    def _read(self, file: str) -> NameRecord:
        at = os.open(file, _READ_FLAGS, dir_fd=self._folders["names"])
        try:
            record = msgspec.json.decode(b"".join(_chunks(at)), type=NameRecord)
        finally:
            os.close(at)
        numbers = [version.number for version in record.versions]
        if _file_of(record.name) != file or sorted(set(numbers)) != numbers:
            raise ValueError(f"{file} is not the record of {record.name}")
        if not {record.current, *(number for number, _ in record.shares)}.issubset(numbers):
            raise ValueError(f"{file} names versions that it does not have")
        return record

    def _has_files(self, record: NameRecord) -> bool:
        folder = self._path / "contents"
        return all((folder / version.folder / name).is_file() for version in record.live for name in FILES)

    def _damaged(self, record: NameRecord) -> str:
        """The first file of a live version that is not as it was stored; "" if there is none."""
        for version in record.live:
            for name, digest in zip(FILES, version.file_hashes, strict=True):
                root = self._path / "contents" / version.folder
                try:
                    at = open_inside(root, str(root / name), os.O_RDONLY)
                except OSError:
                    return name
                try:
                    hasher = hashlib.sha256()
                    for chunk in _chunks(at):
                        hasher.update(chunk)
                finally:
                    os.close(at)
                if hasher.hexdigest() != digest:
                    return name
        return ""


def open_registry(data_dir: str | None, folder: Path, history: int) -> AdapterRegistry:
    """The record in --data-dir, or without it in the server's own folder; OSError."""
    return AdapterRegistry(folder if data_dir is None else data_dir, history, is_durable=data_dir is not None)


def _file_of(name: str) -> str:
    return f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"


def _chunks(file: int) -> Iterator[bytes]:
    while chunk := os.read(file, _CHUNK_BYTES):
        yield chunk


def _write_all(file: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]
