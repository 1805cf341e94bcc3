"""/v1/fine_tuning/jobs/{id}/events and /checkpoints: how a job goes, as lists and as a stream."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.answers.sse import DONE, DeltaStreamResponse, event
from stellarbyte_server.api.contract import tuning_objects
from stellarbyte_server.api.contract.bodies.body import parse_named
from stellarbyte_server.api.contract.bodies.tuning.jobs import CheckpointsQuery, EventsQuery
from stellarbyte_server.api.contract.errors import ApiError, bad_request
from stellarbyte_server.api.contract.operation import Operation
from stellarbyte_server.api.routes.batch.storage import page
from stellarbyte_server.api.routes.tuning.jobs import JOB_ID, find_job
from stellarbyte_server.api.routes.tuning.objects import checkpoint_objects, event_object, tuning_of
from stellarbyte_server.api.service import Service, ServiceOfRequest
from stellarbyte_server.tuning.jobs import Job
from stellarbyte_server.tuning.store import TuningStore

router = APIRouter()
LOOK_S = 0.25  # between polls for new events
_AT_ONCE = 100  # events
_EVENTS, _CHECKPOINTS = 20, 10


@router.get("/v1/fine_tuning/jobs/{job_id}/events")
@Operation(
    access=Access.USER,
    summary="List the events of a fine-tuning job, newest first, or stream them",
    tag="Fine-tuning",
    query=EventsQuery,
    answer=tuning_objects.FineTuningEventList,
    errors=(400, 404),
    path_parameters=JOB_ID,
)
async def list_events(job_id: str, http: Request, service: ServiceOfRequest) -> Response:
    store = tuning_of(service)
    job = await find_job(http, store, job_id)
    query = parse_named(EventsQuery, http.query_params.multi_items())
    if query.stream:
        if query.limit is not None:
            raise bad_request("The field 'limit' is of lists, not of streams.", "limit")
        await _require_event(store, job, query.after)
        return DeltaStreamResponse((), _stream(service, store, job, query.after), {})
    limit = _EVENTS if query.limit is None else query.limit
    try:
        found, has_more = await asyncio.to_thread(store.jobs.events, job.id, limit=limit, after=query.after)
    except KeyError:
        raise _no_event(query.after) from None
    return JSONResponse(page([event_object(*each) for each in found], has_more=has_more))


async def _require_event(store: TuningStore, job: Job, after: str | None) -> None:
    try:
        await asyncio.to_thread(store.jobs.events_since, job.id, after, 1)
    except KeyError:
        raise _no_event(after) from None


def _no_event(after: str | None) -> ApiError:
    return bad_request(f"The event {after!r:.100} does not exist.", "after")


async def _stream(service: Service, store: TuningStore, job: Job, after: str | None) -> AsyncIterator[bytes]:
    """Events after `after`, until the job is over or the server stops."""
    last = after
    while True:
        now = await asyncio.to_thread(store.jobs.find, job.id)  # before the events: the last ones are sent, too
        found = await asyncio.to_thread(store.jobs.events_since, job.id, last, _AT_ONCE)
        for event_id, each in found:
            yield event(event_object(event_id, each))
            last = event_id
        if found:
            continue
        if now is None or now.is_over or not service.client.is_admitting:
            break
        await asyncio.sleep(LOOK_S)
    yield DONE


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
@Operation(
    access=Access.USER,
    summary="List the checkpoints of a fine-tuning job that can be used as models, newest first",
    tag="Fine-tuning",
    query=CheckpointsQuery,
    answer=tuning_objects.FineTuningCheckpointList,
    errors=(400, 404),
    path_parameters=JOB_ID,
)
async def list_checkpoints(job_id: str, http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    store = tuning_of(service)
    job = await find_job(http, store, job_id)
    query = parse_named(CheckpointsQuery, http.query_params.multi_items())
    limit = _CHECKPOINTS if query.limit is None else query.limit
    shown = checkpoint_objects(job, await asyncio.to_thread(_train_losses, store, job))
    if query.after is not None:
        ids = [each["id"] for each in shown]
        if query.after not in ids:
            raise bad_request(f"The checkpoint {query.after!r:.100} does not exist.", "after")
        shown = shown[ids.index(query.after) + 1 :]
    return page(shown[:limit], has_more=len(shown) > limit)


def _train_losses(store: TuningStore, job: Job) -> dict[int, float]:
    """By step."""
    events = (each.data for _, each in store.jobs.events_since(job.id, None, -1))
    return {int(data["step"]): data["train_loss"] for data in events if data is not None and "train_loss" in data}
