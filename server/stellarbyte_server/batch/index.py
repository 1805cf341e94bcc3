"""An index of --data-dir: one SQLite database, which all HTTP processes of a server open.

The database is the only record of what it lists, so an interrupted server continues from it.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

_BUSY_S = 10.0  # how long one process waits for another's transaction
# Of files and batches.
SCHEMA = """
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
    """A connection that one thread uses at a time."""

    def __init__(self, path: Path, schema: str = SCHEMA, version: int = 1) -> None:
        """`version`: of the schema."""
        self._schema = schema
        self._version = version
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")

    def prepare(self) -> None:
        """Create the tables; ValueError if another version of the server made them."""
        with self.transaction() as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in filter(str.strip, self._schema.split(";")):
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {self._version}")
            elif version != self._version:
                raise ValueError(f"the index has version {version}; this server reads version {self._version}")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction that excludes other processes' writes."""
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
        """For single statements that only read."""
        with self._lock:
            yield self._connection

    def close(self) -> None:
        with self._lock:
            self._connection.close()
