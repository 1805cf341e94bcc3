"""Types of fields common to several bodies."""

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, GetJsonSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema, to_json

from stellarbyte_server.api.contract.bodies.bounds import AtMost, wrong
from stellarbyte_server.protocol.request import MAX_PRIORITY
from stellarbyte_server.tokens.tokenizer import RESERVED_VARIABLES

MAX_STOP_STRINGS = 32
MAX_STOP_CHARACTERS = 1000
MAX_TOKEN_ID = 2**31 - 1

ONLY_KIND = "The only supported value."
UNUSED = "Has no effect."
USER = "The end user, who keeps one version of an adapter while its versions share the requests."
MODEL = (
    "The served model's name; an adapter's name; NAME@HASH, an adapter in one version; or up to 4 adapters, joined by"
    " +, whose changes to the weights add up."
)

T = TypeVar("T")
OF_MODEL = object()  # in the metadata of a field
OfModel = Annotated[T | None, OF_MODEL]  # the default comes from the model's generation_config.json


def of_model(meaning: str, otherwise: object) -> Any:
    """An `OfModel` field; `otherwise` documents the default if the file does not set the field."""
    return Field(
        default=None, description=f"{meaning} Default: from the model's generation_config.json, else {otherwise}."
    )


def optional(meaning: str) -> Any:
    """A field that may be absent or null, with the same meaning."""
    return Field(default=None, description=meaning)


def required(meaning: str) -> Any:
    return Field(description=meaning)


class OrText:
    """Documents that a list may also be a string. A union would name its branches in errors."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(schema)]}


SchemaName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(ge=0, le=1)]  # 0: the likeliest token
TopK = Annotated[int, Field(ge=-1, lt=2**31), AfterValidator(lambda top_k: max(0, top_k))]  # -1 and 0: all
MinP = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Priority = Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
CacheSalt = Annotated[str, Field(min_length=1, max_length=256)]
AdapterScale = Annotated[float, Field(ge=0, le=8)]
AdapterId = Annotated[str, Field(min_length=1, max_length=256)]
MixedName = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^+]+$")]
MaxTokens = Annotated[int, Field(ge=1, lt=2**63)]


def _local(value: object) -> object:
    if value is not None and value != "local":
        raise wrong("it must be 'local'; adapters of other sources are loaded with /v1/load_lora_adapter")
    return value


AdapterSource = Annotated[Literal["local"] | None, BeforeValidator(_local)]


def _stop_strings(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, tuple) else value
    if isinstance(texts, list) and len(texts) > MAX_STOP_STRINGS:
        raise wrong(f"there may be at most {MAX_STOP_STRINGS} stop strings")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise wrong("it must be a string or a list of strings")
    if not all(1 <= len(text) <= MAX_STOP_CHARACTERS for text in texts):
        raise wrong(f"a stop string must have 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(texts)


_STOP_STRING_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
_STOP_SCHEMA = {
    "anyOf": [
        _STOP_STRING_SCHEMA,
        {"type": "array", "items": _STOP_STRING_SCHEMA, "maxItems": MAX_STOP_STRINGS},
        {"type": "null"},
    ]
}
StopStrings = Annotated[tuple[str, ...] | None, BeforeValidator(_stop_strings), WithJsonSchema(_STOP_SCHEMA)]

MAX_VARIABLES = 64
MAX_VARIABLES_BYTES = 16_384  # of all their JSON
_VARIABLE_NAME = re.compile("[a-zA-Z][a-zA-Z0-9_]{0,63}")


def _variables(value: dict[str, Any]) -> dict[str, Any]:
    for name in value:
        if _VARIABLE_NAME.fullmatch(name) is None:
            raise wrong(f"{name!r:.80} is not a name of a variable: a letter, then up to 63 letters, digits and _")
        if name in RESERVED_VARIABLES:
            raise wrong(f"'{name}' is not a variable that a request may set")
    num_bytes = len(to_json(value))
    if num_bytes > MAX_VARIABLES_BYTES:
        raise wrong(f"it has {num_bytes} bytes as JSON; at most {MAX_VARIABLES_BYTES} are allowed")
    return value


TemplateArguments = Annotated[dict[str, Any], AfterValidator(_variables), AtMost(MAX_VARIABLES)]
