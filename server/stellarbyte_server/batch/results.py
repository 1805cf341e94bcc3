"""The results of a running batch: two files, to which each answered request adds a line.

An interrupted server continues with the requests that have no complete line.
"""

import contextlib
import os
import secrets
import threading
from typing import Any, BinaryIO

import msgspec

from stellarbyte_server.batch.batches import Batch, Counts, Ending
from stellarbyte_server.batch.files import Files, StoredFile, new_file_id, write_all
from stellarbyte_server.batch.folder import DataFolder


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one request of a batch."""

    status: int
    request_id: str
    body: bytes  # JSON
    retry_after_s: float | None = None

    @property
    def error_code(self) -> str | None:
        """The code of an error; None for other answers."""
        with contextlib.suppress(msgspec.MsgspecError):
            return msgspec.json.decode(self.body, type=_ErrorBody).error.code
        return None


class _Error(msgspec.Struct):
    code: str | None = None


class _ErrorBody(msgspec.Struct):
    error: _Error


class _Result(msgspec.Struct):
    custom_id: str


def output_name(batch: Batch) -> str:
    return f"{batch.id}.output"


def errors_name(batch: Batch) -> str:
    return f"{batch.id}.errors"


class Results:
    """The results of one running batch; `close` it. Any thread."""

    def __init__(self, folder: DataFolder, batch: Batch) -> None:
        """Read the results that an earlier process has written."""
        self.done: set[str] = set()  # custom_ids
        self.num_bytes = 0
        self._num_failed = 0
        self._lock = threading.Lock()
        self._outputs = folder.open("work", output_name(batch), "ab")
        self._errors = folder.open("work", errors_name(batch), "ab")
        self._read(folder, output_name(batch), self._outputs)
        num_completed = len(self.done)
        self._read(folder, errors_name(batch), self._errors)
        self._num_failed = len(self.done) - num_completed

    def _read(self, folder: DataFolder, name: str, appended: BinaryIO) -> None:
        whole = 0
        with folder.open("work", name, "rb") as raw, open(raw.fileno(), "rb", closefd=False) as file:
            for line in file:
                try:
                    result = msgspec.json.decode(line, type=_Result)
                except msgspec.DecodeError:
                    break
                if not line.endswith(b"\n"):
                    break
                self.done.add(result.custom_id)
                whole += len(line)
        os.ftruncate(appended.fileno(), whole)
        self.num_bytes += whole

    def counts(self, total: int) -> Counts:
        with self._lock:
            return Counts(total=total, completed=len(self.done) - self._num_failed, failed=self._num_failed)

    def add_answer(self, custom_id: str, answer: Answer) -> None:
        response = {"status_code": answer.status, "request_id": answer.request_id, "body": msgspec.Raw(answer.body)}
        self._add(custom_id, response, None, is_failed=answer.status != 200)

    def add_expired(self, custom_id: str) -> None:
        message = "This request was not run before the batch's completion window ended."
        self._add(custom_id, None, {"code": "batch_expired", "message": message}, is_failed=True)

    def _add(self, custom_id: str, response: Any, error: Any, *, is_failed: bool) -> None:
        result = {
            "id": f"batch_req_{secrets.token_hex(16)}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
        }
        line = msgspec.json.encode(result) + b"\n"
        with self._lock:
            write_all(self._errors if is_failed else self._outputs, line)
            self.done.add(custom_id)
            self._num_failed += is_failed
            self.num_bytes += len(line)

    def sync(self) -> None:
        """Make all added results durable."""
        for file in (self._outputs, self._errors):
            os.fsync(file.fileno())

    def close(self) -> None:
        self._outputs.close()
        self._errors.close()


def planned(batch: Batch, results: Results, ending: Ending, now: int) -> Batch:
    """The batch before its end, with the ids of its future files; a file without lines is not kept."""
    counts = results.counts(batch.counts.total)
    return msgspec.structs.replace(
        batch,
        status=batch.status if ending == "cancelled" else "finalizing",
        ending=ending,
        counts=counts,
        finalizing_at=None if ending == "cancelled" else now,
        output_file_id=new_file_id() if counts.completed else None,
        error_file_id=new_file_id() if counts.failed else None,
    )


def publish(batch: Batch, folder: DataFolder, files: Files, now: int) -> None:
    """Store the results of a `planned` batch as files of its owner. May be repeated after an interruption."""
    for name, file_id, kind in (
        (output_name(batch), batch.output_file_id, "output"),
        (errors_name(batch), batch.error_file_id, "error"),
    ):
        if file_id is None:
            folder.remove("work", name)
            continue
        num_bytes = folder.size("work", name)
        if num_bytes is None:
            num_bytes = folder.size("files", file_id)
        if num_bytes is None:
            continue  # published before, and since removed
        file = StoredFile(
            id=file_id,
            owner=batch.owner,
            filename=f"{batch.id}_{kind}.jsonl",
            purpose="batch_output",
            bytes=num_bytes,
            created_at=now,
            expires_at=now + batch.outputs_kept_s,
        )
        files.adopt(name, file)
