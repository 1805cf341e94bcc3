"""Models of files and batches, for the OpenAPI document and tests (see objects.py)."""

from typing import Annotated, Literal

from pydantic import Field

from stellarbyte_server.api.contract.objects import AnswerObject, Count

UnixSeconds = Annotated[int, Field(description="Unix seconds.")]


class FileObject(AnswerObject):
    id: str
    object: Literal["file"]
    bytes: Count
    created_at: UnixSeconds
    expires_at: UnixSeconds
    filename: str
    purpose: Literal["batch", "batch_output", "fine-tune", "fine-tune-results"]
    status: Literal["processed"]
    status_details: None


class FileList(AnswerObject):
    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(AnswerObject):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


class BatchError(AnswerObject):
    code: str
    message: str
    param: str | None
    line: Annotated[int | None, Field(description="Of the input file, from 1.")]


class BatchErrors(AnswerObject):
    object: Literal["list"]
    data: list[BatchError]


class RequestCounts(AnswerObject):
    total: Count
    completed: Count
    failed: Count


class BatchObject(AnswerObject):
    id: str
    object: Literal["batch"]
    endpoint: str
    errors: Annotated[BatchErrors | None, Field(description="The reasons why the batch failed.")]
    input_file_id: str
    completion_window: Literal["24h"]
    status: Literal[
        "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: Annotated[str | None, Field(description="Answers with status 200, a line each, in any order.")]
    error_file_id: Annotated[str | None, Field(description="All other requests that were run, a line each.")]
    created_at: UnixSeconds
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(AnswerObject):
    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
