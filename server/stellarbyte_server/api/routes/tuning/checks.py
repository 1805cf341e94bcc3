"""POST /v1/fine_tuning/files/check: what a job would be, before there is one."""

import asyncio
from functools import partial
from typing import Any

from fastapi import APIRouter, Request

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.caller import owner_id, require_fine_tuning
from stellarbyte_server.api.contract import tuning_objects
from stellarbyte_server.api.contract.bodies.body import parse_plain_body
from stellarbyte_server.api.contract.bodies.tuning.jobs import CheckBody
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.contract.operation import BODY_REFUSED, Operation
from stellarbyte_server.api.disconnect import unless_client_leaves
from stellarbyte_server.api.generation import parse_apart
from stellarbyte_server.api.key_rate import charge
from stellarbyte_server.api.routes.batch.storage import storage_of
from stellarbyte_server.api.routes.tuning.jobs import TAG
from stellarbyte_server.api.routes.tuning.objects import hyperparameters_object, tuning_of
from stellarbyte_server.api.routes.tuning.plan import plan_of
from stellarbyte_server.api.routes.tuning.requested import hyperparameters_of, require_files
from stellarbyte_server.api.service import ServiceOfRequest
from stellarbyte_server.tuning.checking import Examples, Forecast, NoForecast, forecast
from stellarbyte_server.tuning.runner import SHOWN_PROBLEMS
from stellarbyte_server.tuning.store import TuningStore

router = APIRouter()
WAIT_LIMIT_S = 30.0  # for checks of others, one of which runs at a time in each HTTP process


@router.post("/v1/fine_tuning/files/check")
@Operation(
    access=Access.USER,
    summary="Check files for a fine-tuning job, and estimate the job",
    tag=TAG,
    bodies=(CheckBody,),
    answer=tuning_objects.FineTuningCheck,
    errors=(*BODY_REFUSED, 403, 404, 429),
)
async def check_files(http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    store, owner = tuning_of(service), owner_id(http)
    key = require_fine_tuning(http)
    body = await parse_apart(http, service, partial(parse_plain_body, CheckBody))
    await charge(http, service)
    await require_files(service, owner, body)
    await _place(store)
    try:
        made = forecast(
            store,
            storage_of(service).files,
            plan_of(service),
            Examples(owner=owner, training_file=body.training_file, validation_file=body.validation_file),
            hyperparameters_of(body),
            max_tokens=None if key is None else key.max_fine_tuning_tokens,
        )
        found = await unless_client_leaves(http.receive, made)
    except (NoForecast, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ApiError(503, f"The files could not be checked: {reason}", headers={"Retry-After": "60"}) from None
    finally:
        store.checks.release()
    speed = await asyncio.to_thread(store.jobs.tokens_per_s, service.settings.model_name)
    return _check_object(found, speed)


async def _place(store: TuningStore) -> None:
    try:
        await asyncio.wait_for(store.checks.acquire(), WAIT_LIMIT_S)
    except TimeoutError:
        headers = {"Retry-After": "10"}
        raise ApiError(429, "Other files are being checked; try again later.", headers=headers) from None


def _check_object(found: Forecast, tokens_per_s: float | None) -> dict[str, Any]:
    plan = found.plan
    return {
        "object": "fine_tuning.check",
        "examples": found.num_examples["training_file"],
        "validation_examples": found.num_examples.get("validation_file"),
        "hyperparameters": hyperparameters_object(found.hyperparameters),
        "steps": None if plan is None else plan.steps,
        "tokens": None if plan is None else plan.tokens,
        "memory": None if plan is None else plan.needed_memory,
        "seconds": None if plan is None or tokens_per_s is None else round(plan.tokens / tokens_per_s, 1),
        "problems": [
            {"param": found.param, "line": problem.line, "message": problem.sentence}
            for problem in found.problems[:SHOWN_PROBLEMS]
        ],
    }
