"""The bodies of POST /v1/load_lora_adapter, /v1/unload_lora_adapter, and of changes of versions."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from stellarbyte_server.api.contract.bodies.bounds import AtMost
from stellarbyte_server.api.contract.bodies.fields import optional, required

MAX_TEXT = 4096
MAX_SHARES = 16
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
VersionName = Annotated[
    Text,
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "minLength": 1, "maxLength": MAX_TEXT}]}
    ),
]
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
    probe: bool | None = optional(
        "Compare the logits after a short prompt with those without the adapter first, and refuse it if it changes none"
        " or makes any NaN or infinite. Default: true."
    )


class UnloadBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    lora_name: Text = required(_NAME)


class RollbackBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    version: VersionName | None = optional(
        "The number of a version, or at least 8 digits of its content hash. Default: the one before the current one."
    )


class SplitBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    shares: Annotated[dict[str, float], AtMost(MAX_SHARES)] = required(
        "The share of the callers for each version, by its number or at least 8 digits of its content hash; together 1."
        " Empty: all callers get the current version."
    )
