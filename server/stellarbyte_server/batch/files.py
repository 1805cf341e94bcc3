"""Stored files. Each belongs to the key that uploaded it, until it expires."""

import codecs
import contextlib
import os
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import msgspec

from stellarbyte_server.batch.folder import DataFolder
from stellarbyte_server.batch.index import Index

DAY_S = 86_400
KEPT_S = 30 * DAY_S  # unless an upload says otherwise
MAX_FILES = 1000  # of one key
MAX_UPLOADS = 4  # of one key to one process at once, because uploads count against the limits only at their end


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file's entry in the index. Times are Unix seconds."""

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int


class TooManyUploads(Exception):
    """A key uploads too many files at once; str() is one sentence for the user."""


class NoRoom(Exception):
    """A key has reached a storage limit; str() is one sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class StoreLimits:
    file_bytes: int  # of one upload
    owner_bytes: int  # of all files of one key


class Upload:
    """A file that is being received; `Files.keep` stores it. Always `close` it."""

    def __init__(self, folder: DataFolder) -> None:
        self.name = secrets.token_hex(16)
        self.num_bytes = 0
        self.is_utf8 = True  # so far
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._folder = folder
        self._file: BinaryIO | None = folder.open("uploads", self.name, "xb")

    def write(self, content: bytes) -> None:
        assert self._file is not None
        write_all(self._file, content)
        self.num_bytes += len(content)
        if self.is_utf8:
            try:
                self._decode(content)
            except UnicodeDecodeError:
                self.is_utf8 = False

    def sync(self) -> None:
        assert self._file is not None
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Delete the file, unless it was stored."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._folder.remove("uploads", self.name)


class Files:
    """The files in --data-dir. Any thread; every method may block on the disk."""

    def __init__(self, folder: DataFolder, index: Index, limits: StoreLimits) -> None:
        self.limits = limits
        self._folder = folder
        self._index = index
        self._uploading: Counter[str] = Counter()

    @contextlib.contextmanager
    def uploading(self, owner: str) -> Iterator[None]:
        """A context in which the owner uploads a file; TooManyUploads. Event loop only."""
        if self._uploading[owner] >= MAX_UPLOADS:
            raise TooManyUploads(f"{MAX_UPLOADS} files are already being uploaded; try again when one is complete.")
        self._uploading[owner] += 1
        try:
            yield
        finally:
            self._uploading[owner] -= 1
            if not self._uploading[owner]:
                del self._uploading[owner]

    def upload(self) -> Upload:
        return Upload(self._folder)

    def keep(self, upload: Upload, *, owner: str, filename: str, purpose: str, kept_s: int) -> StoredFile:
        """Store an upload as a file; NoRoom if its owner would have too many files or bytes."""
        upload.sync()
        now = int(time.time())
        file = StoredFile(
            id=new_file_id(),
            owner=owner,
            filename=filename,
            purpose=purpose,
            bytes=upload.num_bytes,
            created_at=now,
            expires_at=now + kept_s,
        )
        with self._index.transaction() as database:
            query = "SELECT COUNT(*), COALESCE(SUM(bytes), 0) FROM files WHERE owner = ?"
            number, num_bytes = database.execute(query, (owner,)).fetchone()
            if number >= MAX_FILES:
                raise NoRoom(f"The limit of {number} files is reached; delete some first.")
            if num_bytes + file.bytes > self.limits.owner_bytes:
                raise NoRoom(
                    f"All files together would have {num_bytes + file.bytes} bytes; at most {self.limits.owner_bytes}"
                    " are allowed; delete some first."
                )
            self._folder.move("uploads", upload.name, "files", file.id)
            _insert(database, file)
        return file

    def adopt(self, name: str, file: StoredFile) -> None:
        """Store a file from work/. May be repeated after an interruption."""
        if self._folder.size("work", name) is not None:
            self._folder.move("work", name, "files", file.id)
        with self._index.transaction() as database:
            _insert(database, file)

    def used_bytes(self, owner: str) -> int:
        query = "SELECT COALESCE(SUM(bytes), 0) FROM files WHERE owner = ?"
        with self._index.reading() as database:
            (num_bytes,) = database.execute(query, (owner,)).fetchone()
        return int(num_bytes)

    def find(self, owner: str, file_id: str, *, even_expired: bool = False) -> StoredFile | None:
        """A file of the owner that has not expired. `even_expired`: also one kept because a batch reads it."""
        now = -1 if even_expired else int(time.time())
        query = f"SELECT {_COLUMNS} FROM files WHERE id = ? AND owner = ? AND expires_at > ?"
        with self._index.reading() as database:
            row = database.execute(query, (file_id, owner, now)).fetchone()
        return None if row is None else StoredFile(**row)

    def open(self, file: StoredFile) -> BinaryIO:
        """Open a file for reading; OSError if it no longer exists."""
        return self._folder.open("files", file.id, "rb")

    def page(
        self, owner: str, *, limit: int, newest_first: bool, after: str | None, purpose: str | None
    ) -> tuple[list[StoredFile], bool]:
        """Up to `limit` files after the file `after`, and whether more follow; KeyError if `after` does not exist."""
        order, sign = ("DESC", "<") if newest_first else ("ASC", ">")
        where, values = "owner = ? AND expires_at > ?", [owner, int(time.time())]
        with self._index.reading() as database:
            if after is not None:
                row = database.execute("SELECT number FROM files WHERE id = ? AND owner = ?", (after, owner)).fetchone()
                if row is None:
                    raise KeyError(after)
                where, values = f"{where} AND number {sign} ?", [*values, row["number"]]
            if purpose is not None:
                where, values = f"{where} AND purpose = ?", [*values, purpose]
            query = f"SELECT {_COLUMNS} FROM files WHERE {where} ORDER BY number {order} LIMIT ?"
            rows = database.execute(query, [*values, limit + 1]).fetchall()
        return [StoredFile(**row) for row in rows[:limit]], len(rows) > limit

    def remove(self, file: StoredFile) -> str | None:
        """Remove a file, unless an unfinished batch reads it. Returns the id of that batch."""
        with self._index.transaction() as database:
            query = "SELECT id FROM batches WHERE input_file_id = ? AND NOT is_over"
            row = database.execute(query, (file.id,)).fetchone()
            if row is not None:
                return str(row["id"])
            database.execute("DELETE FROM files WHERE id = ?", (file.id,))
        self._folder.remove("files", file.id)
        return None

    def remove_expired(self) -> None:
        """Remove expired files that no batch reads."""
        unused = "id NOT IN (SELECT input_file_id FROM batches WHERE NOT is_over)"
        with self._index.transaction() as database:
            query = f"DELETE FROM files WHERE expires_at <= ? AND {unused} RETURNING id"
            expired = [row["id"] for row in database.execute(query, (int(time.time()),)).fetchall()]
        for file_id in expired:
            self._folder.remove("files", file_id)

    def remove_leftovers(self, planned: set[str]) -> None:
        """At the start: remove the remains of an interrupted server. `planned` files stay."""
        with self._index.reading() as database:
            known = {row["id"] for row in database.execute("SELECT id FROM files").fetchall()}
        for name in set(self._folder.names("files")) - known - planned:
            self._folder.remove("files", name)
        for name in self._folder.names("uploads"):
            self._folder.remove("uploads", name)


_COLUMNS = ", ".join(StoredFile.__struct_fields__)


def _insert(database: sqlite3.Connection, file: StoredFile) -> None:
    values = ", ".join("?" * len(StoredFile.__struct_fields__))
    database.execute(f"INSERT OR IGNORE INTO files ({_COLUMNS}) VALUES ({values})", msgspec.structs.astuple(file))


def new_file_id() -> str:
    return f"file-{secrets.token_hex(16)}"


def write_all(file: BinaryIO, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]
