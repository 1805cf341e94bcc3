"""Batches and their progress. Every change of state is one transaction of the index."""

import secrets
import time
from collections.abc import Callable
from typing import Literal

import msgspec

from stellarbyte_server.batch.files import DAY_S, KEPT_S, NoRoom
from stellarbyte_server.batch.index import Index

WINDOW_S = DAY_S  # OpenAI's only completion_window, 24h
MAX_UNFINISHED = 100  # batches of one key
Ending = Literal["completed", "failed", "expired", "cancelled"]
Status = Literal["validating", "in_progress", "finalizing", "cancelling", Ending]
Endpoint = Literal["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/responses"]


class BatchProblem(msgspec.Struct, frozen=True, kw_only=True):
    """A reason why a batch failed."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None  # of the input, from 1


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch in its current state. Times are Unix seconds."""

    id: str
    owner: str
    endpoint: Endpoint
    input_file_id: str
    metadata: dict[str, str] | None
    outputs_kept_s: int = KEPT_S
    status: Status = "validating"
    ending: Ending | None = None  # the final status, once it is decided
    problems: tuple[BatchProblem, ...] = ()
    output_file_id: str | None = None  # may be set before the file exists
    error_file_id: str | None = None
    counts: Counts = Counts()
    created_at: int
    expires_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    cancelling_at: int | None = None
    ended_at: int | None = None

    @property
    def is_over(self) -> bool:
        return self.ended_at is not None


class Batches:
    """The batches in --data-dir. Any thread; every method may block on the disk."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def create(
        self,
        *,
        owner: str,
        endpoint: Endpoint,
        input_file_id: str,
        metadata: dict[str, str] | None,
        outputs_kept_s: int,
    ) -> Batch:
        """NoRoom if the owner has too many unfinished batches, LookupError if the input no longer exists."""
        now = int(time.time())
        batch = Batch(
            id=f"batch_{secrets.token_hex(16)}",
            owner=owner,
            endpoint=endpoint,
            input_file_id=input_file_id,
            metadata=metadata,
            outputs_kept_s=outputs_kept_s,
            created_at=now,
            expires_at=now + WINDOW_S,
        )
        with self._index.transaction() as database:
            query = "SELECT COUNT(*) FROM batches WHERE owner = ? AND NOT is_over"
            (number,) = database.execute(query, (owner,)).fetchone()
            if number >= MAX_UNFINISHED:
                raise NoRoom(f"The limit of {number} unfinished batches is reached; wait until some have ended.")
            if database.execute("SELECT 1 FROM files WHERE id = ?", (input_file_id,)).fetchone() is None:
                raise LookupError("no such file")
            database.execute(
                "INSERT INTO batches (id, owner, is_over, input_file_id, forget_at, content) VALUES (?, ?, 0, ?, ?, ?)",
                (batch.id, owner, input_file_id, batch.expires_at + KEPT_S, msgspec.json.encode(batch)),
            )
        return batch

    def find(self, batch_id: str, owner: str | None = None) -> Batch | None:
        """A batch of an owner; `owner` None: of any owner."""
        with self._index.reading() as database:
            row = database.execute("SELECT owner, content FROM batches WHERE id = ?", (batch_id,)).fetchone()
        if row is None or (owner is not None and row["owner"] != owner):
            return None
        return msgspec.json.decode(row["content"], type=Batch)

    def page(self, owner: str, *, limit: int, after: str | None) -> tuple[list[Batch], bool]:
        """Up to `limit` batches after `after`, newest first, and whether more follow; KeyError if `after` is absent."""
        where, values = "owner = ?", [owner]
        with self._index.reading() as database:
            if after is not None:
                query = "SELECT number FROM batches WHERE id = ? AND owner = ?"
                row = database.execute(query, (after, owner)).fetchone()
                if row is None:
                    raise KeyError(after)
                where, values = "owner = ? AND number < ?", [owner, row["number"]]
            query = f"SELECT content FROM batches WHERE {where} ORDER BY number DESC LIMIT ?"
            rows = database.execute(query, [*values, limit + 1]).fetchall()
        return [msgspec.json.decode(row["content"], type=Batch) for row in rows[:limit]], len(rows) > limit

    def unfinished(self, limit: int) -> list[Batch]:
        """The oldest unfinished batches."""
        with self._index.reading() as database:
            query = "SELECT content FROM batches WHERE NOT is_over ORDER BY number LIMIT ?"
            rows = database.execute(query, (limit,)).fetchall()
        return [msgspec.json.decode(row["content"], type=Batch) for row in rows]

    def change(self, batch_id: str, change: Callable[[Batch], Batch]) -> Batch | None:
        """Replace a batch with the result of `change`, and return it; None if the batch no longer exists."""
        with self._index.transaction() as database:
            row = database.execute("SELECT content FROM batches WHERE id = ?", (batch_id,)).fetchone()
            if row is None:
                return None
            before = msgspec.json.decode(row["content"], type=Batch)
            after = change(before)
            if after != before:
                database.execute(
                    "UPDATE batches SET is_over = ?, content = ? WHERE id = ?",
                    (after.is_over, msgspec.json.encode(after), batch_id),
                )
        return after

    def cancel(self, batch_id: str) -> Batch | None:
        """Cancel a batch, unless it has ended or is about to end."""
        return self.change(batch_id, _cancelled)

    def remove_old(self) -> None:
        """Delete batches that ended long ago."""
        with self._index.transaction() as database:
            database.execute("DELETE FROM batches WHERE is_over AND forget_at <= ?", (int(time.time()),))

    def planned_files(self) -> set[str]:
        """Files of batches that are about to end."""
        unfinished = self.unfinished(-1)
        planned = {file_id for batch in unfinished for file_id in (batch.output_file_id, batch.error_file_id)}
        return {file_id for file_id in planned if file_id is not None}


def _cancelled(batch: Batch) -> Batch:
    if batch.status not in ("validating", "in_progress"):
        return batch
    return msgspec.structs.replace(batch, status="cancelling", cancelling_at=int(time.time()))
