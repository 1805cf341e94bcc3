"""The form of POST /v1/files, and the query of its list."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from stellarbyte_server.api.contract.bodies.batch.batches import FileId, KeptSeconds
from stellarbyte_server.api.contract.bodies.fields import optional, required

MAX_PAGE = 10_000
MAX_FILENAME = 255  # characters
Purpose = Literal["batch", "fine-tune"]


class FileForm(BaseModel):
    """The fields of a form other than its file; brackets are part of their names."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    purpose: Purpose = required(
        "batch: the input of a batch; fine-tune: examples of a fine-tuning job; both JSON lines."
    )
    anchor: Literal["created_at"] | None = Field(
        default=None, alias="expires_after[anchor]", description="The start of the time in expires_after[seconds]."
    )
    seconds: KeptSeconds | None = Field(
        default=None,
        alias="expires_after[seconds]",
        description="How long the file is kept, from an hour to 30 days. Default: 30 days.",
    )


class UploadForm(FileForm):
    """The whole form, for the OpenAPI document."""

    file: Annotated[Any, WithJsonSchema({"type": "string", "format": "binary"})] = required(
        "The content, with a filename."
    )


class FilesQuery(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    purpose: Literal["batch", "batch_output", "fine-tune", "fine-tune-results"] | None = optional(
        "Only files of this purpose."
    )
    after: FileId | None = optional("The id of the last file of the previous page.")
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] | None = optional("Files per page, 1 to 10000. Default: 10000.")
    order: Literal["asc", "desc"] | None = optional("The order by creation. Default: desc, newest first.")
