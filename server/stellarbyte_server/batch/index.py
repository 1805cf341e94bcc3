"""The index of files and batches: one SQLite database, which all HTTP processes of a server open.

SQLite is the one place that says what there is, so a server that ends in the middle of anything goes on from it.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

_VERSION = 1
_BUSY_S = 10.0  # how long one process waits for another's transaction
_SCHEMA = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL
) STRICT;
CREATE INDEX files_of_owner ON files (owner, number);
CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    is_over INTEGER NOT NULL,
    input_file_id TEXT NOT NULL,
    forget_at INTEGER NOT NULL,
    content BLOB NOT NULL
) STRICT;
CREATE INDEX batches_of_owner ON batches (owner, number);
CREATE INDEX unfinished_batches ON batches (number) WHERE NOT is_over;
"""


class Index:
    """A connection that threads take in turn."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")

    def prepare(self) -> None:
        """Make the tables; ValueError when they are of another version of the server."""
        with self.transaction() as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {_VERSION}")
            elif version != _VERSION:
                raise ValueError(f"the index has version {version}; this server reads version {_VERSION}")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All statements within happen at once, or none; no other process writes meanwhile."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """For single statements that change nothing."""
        with self._lock:
            yield self._connection

    def close(self) -> None:
        with self._lock:
            self._connection.close()
