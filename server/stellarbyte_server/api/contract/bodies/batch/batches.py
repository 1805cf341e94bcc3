"""The body of POST /v1/batches, and the query of its list."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from stellarbyte_server.api.contract.bodies.fields import optional, required
from stellarbyte_server.api.contract.bodies.unused import Metadata

MAX_ID = 64  # characters
MAX_PAGE = 100
HOUR_S = 3600
MAX_KEPT_S = 30 * 24 * HOUR_S
FileId = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
KeptSeconds = Annotated[int, Field(ge=HOUR_S, le=MAX_KEPT_S)]


class ExpiresAfter(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    anchor: Literal["created_at"] = required("The start of the time.")
    seconds: KeptSeconds = required("From an hour to 30 days.")


class BatchBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    input_file_id: FileId = required(
        "A file with purpose batch: one JSON object {custom_id, method, url, body} per line."
    )
    endpoint: Literal["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/responses"] = required(
        "The route of all requests."
    )
    completion_window: Literal["24h"] = required("Requests not run by then end with an error.")
    metadata: Metadata = optional("Returned with the batch.")
    output_expires_after: ExpiresAfter | None = optional("How long the results are kept. Default: 30 days.")


class BatchesQuery(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    after: FileId | None = optional("The id of the last batch of the previous page.")
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] | None = optional("Batches per page, 1 to 100. Default: 20.")
