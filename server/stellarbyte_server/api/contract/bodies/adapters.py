"""The bodies of POST /v1/load_lora_adapter and /v1/unload_lora_adapter."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from stellarbyte_server.api.contract.bodies.fields import optional, required

MAX_TEXT = 4096
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
_NAME = "The adapter's name."


class LoadBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    lora_name: Text = required(_NAME)
    lora_path: Text = required(
        "A folder inside --adapter-dir, the path of one of --lora-modules, or a source hf://ORG/NAME[@REVISION] or"
        " s3://BUCKET/PREFIX that --adapter-source allows."
    )
    load_inplace: bool | None = optional(
        "Replace the adapter of this name. Default: false, which refuses a name in use."
    )
    base_model_name: Text | None = optional("The served model, as its name or as --model; another one is refused.")
    pinned: bool | None = optional(
        "Keep the adapter in a slot from the moment when one is idle. Default: as the adapter of this name, else false."
    )


class UnloadBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    lora_name: Text = required(_NAME)
