"""/v1/fine_tuning/jobs: examples become an adapter; and DELETE /v1/models/{name} for its model."""

import asyncio
import secrets
import time
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.adapter_versions import AdapterVersions
from stellarbyte_server.api.caller import owner_id, owner_of, require_fine_tuning, require_model
from stellarbyte_server.api.contract import tuning_objects
from stellarbyte_server.api.contract.bodies.body import parse_named, parse_plain_body
from stellarbyte_server.api.contract.bodies.tuning.jobs import FineTuningBody, JobsQuery
from stellarbyte_server.api.contract.errors import ApiError, bad_request, from_engine
from stellarbyte_server.api.contract.operation import BODY_REFUSED, Operation
from stellarbyte_server.api.generation import parse_apart
from stellarbyte_server.api.key_rate import charge
from stellarbyte_server.api.routes.adapters import locks_of
from stellarbyte_server.api.routes.batch.storage import no_such, page
from stellarbyte_server.api.routes.tuning.objects import job_object, tuning_of
from stellarbyte_server.api.routes.tuning.requested import hyperparameters_of, publication, require_files
from stellarbyte_server.api.service import Service, ServiceOfRequest
from stellarbyte_server.batch.files import NoRoom
from stellarbyte_server.client.engine_client import EngineDead
from stellarbyte_server.config.settings import TUNED_PREFIX
from stellarbyte_server.protocol.request import ADAPTER_NOT_FOUND, RequestRejected, adapter_loading, model_not_found
from stellarbyte_server.sources.reservation import NameReserved, reserved
from stellarbyte_server.tuning.jobs import Event, Job, Status, new_job_id
from stellarbyte_server.tuning.results import checkpoint_name
from stellarbyte_server.tuning.store import TuningStore

router = APIRouter()
JOB_ID = (("job_id", "A job's id."),)
TAG = "Fine-tuning"
_MAX_JOBS = 4  # unfinished ones of one key, or of all without keys
_PAGE = 20


@router.post("/v1/fine_tuning/jobs")
@Operation(
    access=Access.USER,
    summary="Start a fine-tuning job",
    tag=TAG,
    bodies=(FineTuningBody,),
    answer=tuning_objects.FineTuningJobObject,
    errors=(*BODY_REFUSED, 403, 404, 429),
)
async def create_job(http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    store, owner = tuning_of(service), owner_id(http)
    key = require_fine_tuning(http)
    body = await parse_apart(http, service, partial(parse_plain_body, FineTuningBody))
    await charge(http, service)
    _require_base(http, service, body.model)
    asked = None if body.publish is None else publication(http, service, body.publish)
    if body.evaluate and body.validation_file is None:
        raise bad_request("The field 'evaluate' needs a 'validation_file'.", "evaluate")
    await require_files(service, owner, body)
    job = Job(
        id=new_job_id(),
        owner=owner,
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        metadata=body.metadata,
        hyperparameters=hyperparameters_of(body),
        publish=asked,
        evaluate=() if body.evaluate is None else tuple(body.evaluate),
        created_at=int(time.time()),
    )
    try:
        most = _MAX_JOBS if key is None else key.max_fine_tuning_jobs
        await asyncio.to_thread(store.jobs.create, job, most=most)
    except NoRoom as error:
        raise ApiError(429, str(error), code="too_many_jobs", headers={"Retry-After": "60"}) from None
    return job_object(job)


def _require_base(http: Request, service: Service, model: str) -> None:
    require_model(http, service, model)
    if model == service.settings.model_name:
        return
    if model.startswith(TUNED_PREFIX):
        raise bad_request(
            "The field 'model' must be the served model; training an adapter further is not supported.", "model"
        )
    raise from_engine(model_not_found(model))


@router.get("/v1/fine_tuning/jobs")
@Operation(
    access=Access.USER,
    summary="List fine-tuning jobs, newest first",
    tag=TAG,
    query=JobsQuery,
    answer=tuning_objects.FineTuningJobList,
    errors=(400,),
)
async def list_jobs(http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    store = tuning_of(service)
    items = http.query_params.multi_items()
    query = parse_named(JobsQuery, [(name, value) for name, value in items if not name.startswith("metadata")])
    try:
        jobs, has_more = await asyncio.to_thread(
            store.jobs.page,
            owner_id(http),
            limit=_PAGE if query.limit is None else query.limit,
            after=query.after,
            metadata=_filter([(name, value) for name, value in items if name.startswith("metadata")]),
        )
    except KeyError:
        raise bad_request(f"The job {query.after!r:.100} does not exist.", "after") from None
    return page([job_object(job) for job in jobs], has_more=has_more)


def _filter(items: list[tuple[str, str]]) -> dict[str, str] | None:
    """metadata[KEY]=VALUE; {} for metadata=null: jobs without metadata."""
    if items == [("metadata", "null")]:
        return {}
    wanted: dict[str, str] = {}
    for name, value in items:
        if not (name.startswith("metadata[") and name.endswith("]")) or name in wanted:
            raise bad_request("The filter must be metadata[KEY]=VALUE, each key once, or metadata=null.", "metadata")
        wanted[name.removeprefix("metadata[").removesuffix("]")] = value
    return wanted or None


@router.get("/v1/fine_tuning/jobs/{job_id}")
@Operation(
    access=Access.USER,
    summary="Describe a fine-tuning job",
    tag=TAG,
    answer=tuning_objects.FineTuningJobObject,
    errors=(400, 404),
    path_parameters=JOB_ID,
)
async def get_job(job_id: str, http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    return job_object(await find_job(http, tuning_of(service), job_id))


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel")
@Operation(
    access=Access.USER,
    summary="Cancel a fine-tuning job",
    tag=TAG,
    answer=tuning_objects.FineTuningJobObject,
    errors=(400, 404),
    path_parameters=JOB_ID,
)
async def cancel_job(job_id: str, http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    waiting: tuple[Status, ...] = ("validating_files", "queued", "running", "paused")
    return await _change(http, service, job_id, waiting, "cancelled")


@router.post("/v1/fine_tuning/jobs/{job_id}/pause")
@Operation(
    access=Access.USER,
    summary="Pause a fine-tuning job after its current step",
    tag=TAG,
    answer=tuning_objects.FineTuningJobObject,
    errors=(400, 404),
    path_parameters=JOB_ID,
)
async def pause_job(job_id: str, http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    return await _change(http, service, job_id, ("queued", "running"), "paused")


@router.post("/v1/fine_tuning/jobs/{job_id}/resume")
@Operation(
    access=Access.USER,
    summary="Continue a paused fine-tuning job",
    tag=TAG,
    answer=tuning_objects.FineTuningJobObject,
    errors=(400, 404),
    path_parameters=JOB_ID,
)
async def resume_job(job_id: str, http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    return await _change(http, service, job_id, ("paused",), "queued")


_EVENTS = {"cancelled": "The job was cancelled", "paused": "The job was paused", "queued": "The job was resumed"}


async def _change(
    http: Request, service: Service, job_id: str, before: tuple[Status, ...], after: Status
) -> dict[str, Any]:
    """Change the status of a job; ApiError unless it is one of `before`."""
    store = tuning_of(service)
    job = await find_job(http, store, job_id)
    was: Status = job.status

    def change(now: Job) -> Job:
        nonlocal was
        was = now.status
        if now.status not in before or (now.goes_live and after != "queued"):
            return now
        finished_at = int(time.time()) if after == "cancelled" else None
        return msgspec.structs.replace(now, status=after, finished_at=finished_at)

    changed = await asyncio.to_thread(store.jobs.change, job.id, change, [Event(message=_EVENTS[after])])
    if changed is None:
        raise no_such("fine-tuning job", job_id)
    if was not in before:
        raise bad_request(f"The job is {was}; only one that is {' or '.join(before)} can become {after}.")
    if changed.goes_live and after != "queued":
        raise bad_request(f"The job is done and its result is going live, so it can no longer become {after}.")
    return job_object(changed)


@router.delete("/v1/models/{name:path}")
@Operation(
    access=Access.USER,
    summary="Delete a fine-tuned model",
    tag=TAG,
    answer=tuning_objects.DeletedModel,
    errors=(400, 404),
    path_parameters=(("name", "The name of a fine-tuned model."),),
)
async def delete_model(name: str, http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    store = tuning_of(service)
    job = await asyncio.to_thread(store.jobs.of_model, name)
    if job is None or job.owner != owner_id(http):
        raise ApiError(404, f"The fine-tuned model {name!r:.200} does not exist.", code="model_not_found")
    for adapter in (*(checkpoint_name(name, checkpoint.step) for checkpoint in job.checkpoints), name):
        try:
            with reserved(locks_of(service), adapter):
                unloading = await AdapterVersions(service, service.registry).unload(adapter, owner_of(http))
            await unloading
        except NameReserved:
            raise from_engine(adapter_loading(adapter)) from None
        except (RequestRejected, EngineDead) as error:
            if isinstance(error, EngineDead) or error.code != ADAPTER_NOT_FOUND:  # it may be unloaded already
                raise from_engine(error) from None
    removed = partial(msgspec.structs.replace, fine_tuned_model=None)
    await asyncio.to_thread(store.jobs.change, job.id, removed, [Event(message=f"The model {name} was deleted")])
    return {"id": name, "object": "model", "deleted": True}


async def find_job(http: Request, store: TuningStore, job_id: str) -> Job:
    """ApiError if the job does not exist, or belongs to another key."""
    job = await asyncio.to_thread(store.jobs.find, job_id, owner_id(http))
    if job is None:
        raise no_such("fine-tuning job", job_id)
    return job
