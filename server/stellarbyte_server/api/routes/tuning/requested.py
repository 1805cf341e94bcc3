"""What the bodies of jobs, checks and publications ask for, checked against the server and the caller."""

import asyncio

from fastapi import Request

from stellarbyte_server.api.caller import owner_of, require_publishing
from stellarbyte_server.api.contract.bodies.tuning.jobs import (
    CheckBody,
    FineTuningBody,
    HyperparametersBody,
    PublicationBody,
)
from stellarbyte_server.api.contract.errors import bad_request
from stellarbyte_server.api.routes.batch.storage import no_such, storage_of
from stellarbyte_server.api.service import Service
from stellarbyte_server.tuning.jobs import Hyperparameters, Publication


def publication(http: Request, service: Service, body: PublicationBody, param: str = "publish.name") -> Publication:
    """ApiError unless the caller may load adapters, and under this name."""
    require_publishing(http)
    if body.name == service.settings.model_name:
        raise bad_request(f"The field {param!r} must differ from the model's name, {body.name!r}.", param)
    return Publication(name=body.name, share=body.share, caller=owner_of(http))


async def require_files(service: Service, owner: str, body: FineTuningBody | CheckBody) -> None:
    """ApiError unless the files of a body are the owner's and for fine-tuning."""
    for param, file_id in (("training_file", body.training_file), ("validation_file", body.validation_file)):
        if file_id is not None:
            await _require_file(service, owner, file_id, param)


async def _require_file(service: Service, owner: str, file_id: str, param: str) -> None:
    file = await asyncio.to_thread(storage_of(service).files.find, owner, file_id)
    if file is None:
        raise no_such("file", file_id, param)
    if file.purpose != "fine-tune":
        raise bad_request(f"The file {file.id} has the purpose {file.purpose}, not fine-tune.", param)


def hyperparameters_of(body: FineTuningBody | CheckBody) -> Hyperparameters:
    """Those of the method, or in OpenAI's older place; ApiError if they are in both."""
    of_method = (
        None if body.method is None or body.method.supervised is None else body.method.supervised.hyperparameters
    )
    if of_method is not None and body.hyperparameters is not None:
        raise bad_request(
            "Give only one of 'hyperparameters' and 'method.supervised.hyperparameters'.", "hyperparameters"
        )
    given = body.hyperparameters if of_method is None else of_method
    given = HyperparametersBody() if given is None else given
    values = {name: None if value == "auto" else value for name, value in given.model_dump().items()}
    return Hyperparameters(**values)
