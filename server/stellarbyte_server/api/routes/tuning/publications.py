"""POST /v1/fine_tuning/jobs/{id}/publish: the adapter of a job becomes a version of a name."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from fastapi import APIRouter, Request

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.adapter_versions import AdapterVersions
from stellarbyte_server.api.contract import tuning_objects
from stellarbyte_server.api.contract.bodies.body import parse_plain_body
from stellarbyte_server.api.contract.bodies.tuning.jobs import PublishBody
from stellarbyte_server.api.contract.errors import bad_request, from_engine
from stellarbyte_server.api.contract.operation import BODY_REFUSED, Operation
from stellarbyte_server.api.generation import parse_apart
from stellarbyte_server.api.routes.adapters import locks_of
from stellarbyte_server.api.routes.batch.storage import no_such
from stellarbyte_server.api.routes.tuning.jobs import JOB_ID, TAG
from stellarbyte_server.api.routes.tuning.objects import job_object, tuning_of
from stellarbyte_server.api.routes.tuning.requested import publication
from stellarbyte_server.api.service import Service, ServiceOfRequest
from stellarbyte_server.client.engine_client import EngineDead
from stellarbyte_server.protocol.request import RequestRejected, adapter_loading
from stellarbyte_server.sources.reservation import NameReserved, reserved
from stellarbyte_server.tuning.jobs import Job, Publication
from stellarbyte_server.tuning.results import published
from stellarbyte_server.tuning.store import TuningStore

router = APIRouter()


@router.post("/v1/fine_tuning/jobs/{job_id}/publish")
@Operation(
    access=Access.ADMIN,
    summary="Make the adapter of a fine-tuning job live under another name",
    tag=TAG,
    bodies=(PublishBody,),
    answer=tuning_objects.FineTuningJobObject,
    errors=(*BODY_REFUSED, 404, 409),
    path_parameters=JOB_ID,
)
async def publish(job_id: str, http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    """Of any key's job: operators decide what is live."""
    store = tuning_of(service)
    body = await parse_apart(http, service, partial(parse_plain_body, PublishBody))
    asked = publication(http, service, body, "name")
    job = await asyncio.to_thread(store.jobs.find, job_id)
    if job is None:
        raise no_such("fine-tuning job", job_id)
    if job.fine_tuned_model is None:
        raise bad_request(f"The job is {job.status} and has no model; only a model of a job can be published.")
    folder = _adapter(store, job, body.checkpoint)
    try:
        live = msgspec.structs.replace(asked, version=await make_live(service, job.id, folder, asked))
    except (RequestRejected, EngineDead) as error:
        raise from_engine(error) from None
    except NameReserved:
        raise from_engine(adapter_loading(asked.name)) from None
    noted = partial(msgspec.structs.replace, publish=live)
    changed = await asyncio.to_thread(store.jobs.change, job.id, noted, [published(live)])
    return job_object(job if changed is None else changed)


def _adapter(store: TuningStore, job: Job, checkpoint_id: str | None) -> Path:
    """The folder of a checkpoint, or of the result; ApiError if the job has no such checkpoint."""
    if checkpoint_id is None or checkpoint_id == job.result_checkpoint:
        return store.adapter(job.id)
    for checkpoint in job.checkpoints:
        if checkpoint.id == checkpoint_id:
            return store.checkpoint(job.id, checkpoint.step)
    raise no_such("checkpoint", checkpoint_id, "checkpoint")


async def make_live(service: Service, job_id: str, folder: Path, asked: Publication) -> int:
    """Make an adapter the current version of a name, and return the version's number.

    Raises:
        RequestRejected, EngineDead, ApiError: as a load of the adapter; the name is as before.
        NameReserved: another call changes the name.
    """
    with reserved(locks_of(service), asked.name):
        _, record = await AdapterVersions(service, service.registry).load(
            asked.name,
            str(folder),
            in_place=True,
            pinned=None,
            probe=True,
            caller=asked.caller,
            job=job_id,
            share=asked.share,
        )
    return record.current
