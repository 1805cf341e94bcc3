"""/v1/files: the inputs and results of batches and fine-tuning jobs."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, BinaryIO

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.caller import owner_id
from stellarbyte_server.api.contract import batch_objects
from stellarbyte_server.api.contract.bodies.batch.files import MAX_PAGE, FileForm, FilesQuery, UploadForm
from stellarbyte_server.api.contract.bodies.body import parse_named
from stellarbyte_server.api.contract.errors import ApiError, bad_request
from stellarbyte_server.api.contract.operation import Operation
from stellarbyte_server.api.key_rate import charge
from stellarbyte_server.api.routes.batch.form import read_form
from stellarbyte_server.api.routes.batch.storage import no_such, page, storage_of
from stellarbyte_server.api.service import ServiceOfRequest
from stellarbyte_server.batch.files import KEPT_S, NoRoom, StoredFile, TooManyUploads
from stellarbyte_server.batch.storage import Storage

logger = logging.getLogger("server.batch")

router = APIRouter()
_ID = (("file_id", "A file's id."),)
_READ_AT_ONCE = 2**18  # bytes


@router.post("/v1/files")
@Operation(
    access=Access.USER,
    summary="Upload a file",
    tag="Files and batches",
    form=UploadForm,
    answer=batch_objects.FileObject,
    errors=(400, 408, 413, 429),
)
async def upload_file(http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    storage, owner = storage_of(service), owner_id(http)
    await charge(http, service)
    try:
        with storage.files.uploading(owner):
            return await _receive(http, storage, owner)
    except TooManyUploads as error:
        raise ApiError(429, str(error), code="too_many_uploads", headers={"Retry-After": "1"}) from None
    except NoRoom as error:
        raise bad_request(str(error), "file", "storage_limit") from None
    except OSError:
        logger.exception("a file could not be stored")
        message = "The server could not store the file; its log has the reason."
        raise ApiError(503, message, code="storage_unavailable", headers={"Retry-After": "60"}) from None


async def _receive(http: Request, storage: Storage, owner: str) -> dict[str, Any]:
    upload = await asyncio.to_thread(storage.files.upload)
    try:
        form = await read_form(http, upload, storage.files.limits.file_bytes)
        fields = parse_named(FileForm, form.fields)
        if (fields.anchor is None) != (fields.seconds is None):
            absent = "anchor" if fields.anchor is None else "seconds"
            raise bad_request(f"The field 'expires_after[{absent}]' is required.", f"expires_after[{absent}]")
        assert form.filename is not None, "the form has a file"
        if fields.purpose == "fine-tune" and not (upload.num_bytes and upload.is_utf8):
            raise bad_request("A file with the purpose fine-tune must be JSON lines in UTF-8.", "file")
        file = await asyncio.to_thread(
            storage.files.keep,
            upload,
            owner=owner,
            filename=form.filename,
            purpose=fields.purpose,
            kept_s=KEPT_S if fields.seconds is None else fields.seconds,
        )
    finally:
        await asyncio.to_thread(upload.close)
    return _object(file)


@router.get("/v1/files")
@Operation(
    access=Access.USER,
    summary="List files",
    tag="Files and batches",
    query=FilesQuery,
    answer=batch_objects.FileList,
    errors=(400,),
)
async def list_files(http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    storage = storage_of(service)
    query = parse_named(FilesQuery, http.query_params.multi_items())
    try:
        files, has_more = await asyncio.to_thread(
            storage.files.page,
            owner_id(http),
            limit=MAX_PAGE if query.limit is None else query.limit,
            newest_first=query.order != "asc",
            after=query.after,
            purpose=query.purpose,
        )
    except KeyError:
        raise bad_request(f"The file {query.after!r:.100} does not exist.", "after") from None
    return page([_object(file) for file in files], has_more=has_more)


@router.get("/v1/files/{file_id}")
@Operation(
    access=Access.USER,
    summary="Describe a file",
    tag="Files and batches",
    answer=batch_objects.FileObject,
    errors=(400, 404),
    path_parameters=_ID,
)
async def get_file(file_id: str, http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    return _object(await _find(http, storage_of(service), file_id))


@router.delete("/v1/files/{file_id}")
@Operation(
    access=Access.USER,
    summary="Delete a file",
    tag="Files and batches",
    answer=batch_objects.DeletedFile,
    errors=(400, 404),
    path_parameters=_ID,
)
async def delete_file(file_id: str, http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    storage = storage_of(service)
    file = await _find(http, storage, file_id)
    batch_id = await asyncio.to_thread(storage.files.remove, file)
    if batch_id is not None:
        raise bad_request(f"The batch {batch_id} still reads this file; wait until it ends, or cancel it.")
    return {"id": file.id, "object": "file", "deleted": True}


@router.get("/v1/files/{file_id}/content")
@Operation(
    access=Access.USER,
    summary="Read a file",
    tag="Files and batches",
    answer="application/octet-stream",
    errors=(400, 404),
    path_parameters=_ID,
)
async def get_content(file_id: str, http: Request, service: ServiceOfRequest) -> Response:
    storage = storage_of(service)
    file = await _find(http, storage, file_id)
    try:
        content = await asyncio.to_thread(storage.files.open, file)
    except FileNotFoundError:
        raise no_such("file", file_id) from None
    headers = {"Content-Length": str(file.bytes), "X-Content-Type-Options": "nosniff"}
    return StreamingResponse(_chunks(content), media_type="application/octet-stream", headers=headers)


async def _chunks(file: BinaryIO) -> AsyncIterator[bytes]:
    try:
        while chunk := await asyncio.to_thread(file.read, _READ_AT_ONCE):
            yield chunk
    finally:
        file.close()


async def _find(http: Request, storage: Storage, file_id: str) -> StoredFile:
    file = await asyncio.to_thread(storage.files.find, owner_id(http), file_id)
    if file is None:
        raise no_such("file", file_id)
    return file


def _object(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }
