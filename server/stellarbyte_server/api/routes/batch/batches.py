"""/v1/batches: many requests in one file, answered in the background."""

import asyncio
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.caller import owner_id
from stellarbyte_server.api.contract import batch_objects
from stellarbyte_server.api.contract.bodies.batch.batches import BatchBody, BatchesQuery
from stellarbyte_server.api.contract.bodies.body import parse_named, parse_plain_body
from stellarbyte_server.api.contract.errors import ApiError, bad_request
from stellarbyte_server.api.contract.operation import BODY_REFUSED, Operation
from stellarbyte_server.api.generation import parse_apart
from stellarbyte_server.api.key_rate import charge
from stellarbyte_server.api.routes.batch.storage import no_such, page, storage_of
from stellarbyte_server.api.service import ServiceOfRequest
from stellarbyte_server.batch.batches import Batch
from stellarbyte_server.batch.files import KEPT_S, NoRoom
from stellarbyte_server.batch.storage import Storage

router = APIRouter()
_ID = (("batch_id", "A batch's id."),)
_PAGE = 20


@router.post("/v1/batches")
@Operation(
    access=Access.USER,
    summary="Start a batch",
    tag="Files and batches",
    bodies=(BatchBody,),
    answer=batch_objects.BatchObject,
    errors=(*BODY_REFUSED, 404, 429),
)
async def create_batch(http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    storage, owner = storage_of(service), owner_id(http)
    body = await parse_apart(http, service, partial(parse_plain_body, BatchBody))
    await charge(http, service)
    file = await asyncio.to_thread(storage.files.find, owner, body.input_file_id)
    if file is None:
        raise no_such("file", body.input_file_id, "input_file_id")
    if file.purpose != "batch":
        raise bad_request(f"The file {file.id} has the purpose {file.purpose}, not batch.", "input_file_id")
    expiry = body.output_expires_after
    try:
        batch = await asyncio.to_thread(
            storage.batches.create,
            owner=owner,
            endpoint=body.endpoint,
            input_file_id=file.id,
            metadata=body.metadata,
            outputs_kept_s=KEPT_S if expiry is None else expiry.seconds,
        )
    except NoRoom as error:
        raise ApiError(429, str(error), code="too_many_batches", headers={"Retry-After": "60"}) from None
    except LookupError:
        raise no_such("file", body.input_file_id, "input_file_id") from None
    return _object(batch)


@router.get("/v1/batches")
@Operation(
    access=Access.USER,
    summary="List batches, newest first",
    tag="Files and batches",
    query=BatchesQuery,
    answer=batch_objects.BatchList,
    errors=(400,),
)
async def list_batches(http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    storage = storage_of(service)
    query = parse_named(BatchesQuery, http.query_params.multi_items())
    limit = _PAGE if query.limit is None else query.limit
    try:
        found = await asyncio.to_thread(storage.batches.page, owner_id(http), limit=limit, after=query.after)
    except KeyError:
        raise bad_request(f"The batch {query.after!r:.100} does not exist.", "after") from None
    batches, has_more = found
    return page([_object(batch) for batch in batches], has_more=has_more)


@router.get("/v1/batches/{batch_id}")
@Operation(
    access=Access.USER,
    summary="Describe a batch",
    tag="Files and batches",
    answer=batch_objects.BatchObject,
    errors=(400, 404),
    path_parameters=_ID,
)
async def get_batch(batch_id: str, http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    return _object(await _find(http, storage_of(service), batch_id))


@router.post("/v1/batches/{batch_id}/cancel")
@Operation(
    access=Access.USER,
    summary="Cancel a batch",
    tag="Files and batches",
    answer=batch_objects.BatchObject,
    errors=(400, 404),
    path_parameters=_ID,
)
async def cancel_batch(batch_id: str, http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    storage = storage_of(service)
    batch = await _find(http, storage, batch_id)
    cancelled = await asyncio.to_thread(storage.batches.cancel, batch.id)
    if cancelled is None:
        raise no_such("batch", batch_id)
    if cancelled.status != "cancelling":
        raise bad_request(f"The batch is {cancelled.status}, so it can no longer be cancelled.")
    return _object(cancelled)


async def _find(http: Request, storage: Storage, batch_id: str) -> Batch:
    batch = await asyncio.to_thread(storage.batches.find, batch_id, owner_id(http))
    if batch is None:
        raise no_such("batch", batch_id)
    return batch


def _object(batch: Batch) -> dict[str, Any]:
    problems = [msgspec.structs.asdict(problem) for problem in batch.problems]
    ended: dict[str, int | None] = {f"{ending}_at": None for ending in ("completed", "failed", "expired", "cancelled")}
    if batch.is_over:
        ended[f"{batch.status}_at"] = batch.ended_at
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": {"object": "list", "data": problems} if problems and batch.is_over else None,
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": batch.status,
        "output_file_id": batch.output_file_id if batch.is_over else None,
        "error_file_id": batch.error_file_id if batch.is_over else None,
        "created_at": batch.created_at,
        "in_progress_at": batch.in_progress_at,
        "expires_at": batch.expires_at,
        "finalizing_at": batch.finalizing_at,
        "cancelling_at": batch.cancelling_at,
        **ended,
        "request_counts": msgspec.structs.asdict(batch.counts),
        "metadata": batch.metadata,
    }
