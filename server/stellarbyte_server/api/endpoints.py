"""The API's endpoints, in the order of the document."""

from stellarbyte_server.api.contract.operation import operations_of
from stellarbyte_server.api.routes import (
    adapter_versions,
    adapters,
    chat,
    completions,
    embeddings,
    health,
    messages,
    models,
    ranking,
    render,
    responses,
    tokenize,
)
from stellarbyte_server.api.routes.batch import batches, files
from stellarbyte_server.api.routes.tuning import checks, events, feedback, jobs, publications

ROUTERS = tuple(
    module.router
    for module in (
        completions,
        chat,
        responses,
        messages,
        embeddings,
        ranking,
        files,
        batches,
        jobs,
        events,
        checks,
        publications,
        feedback,
        models,
        adapters,
        adapter_versions,
        tokenize,
        render,
        health,
    )
)
OPERATIONS = operations_of(ROUTERS)
