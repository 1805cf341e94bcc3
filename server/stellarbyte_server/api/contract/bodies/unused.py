"""OpenAI's fields that have no effect here, with OpenAI's types, so that invalid values are refused."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from stellarbyte_server.api.contract.bodies.bounds import wrong

MAX_METADATA = 16  # pairs
MAX_METADATA_KEY = 64  # characters
MAX_METADATA_VALUE = 512


def _metadata(value: object) -> object:
    """Checks the number of pairs before any pair."""
    if value is None:
        return None
    problem = None
    if not isinstance(value, dict):
        problem = "it must be an object of strings"
    elif len(value) > MAX_METADATA:
        problem = f"it may have at most {MAX_METADATA} entries"
    elif not all(isinstance(text, str) for text in value.values()):
        problem = "its values must be strings"
    elif max(map(len, value), default=0) > MAX_METADATA_KEY:
        problem = f"its keys may have at most {MAX_METADATA_KEY} characters"
    elif max(map(len, value.values()), default=0) > MAX_METADATA_VALUE:
        problem = f"its values may have at most {MAX_METADATA_VALUE} characters"
    if problem is not None:
        raise wrong(problem)
    return value


_METADATA_SCHEMA = {
    "type": "object",
    "maxProperties": MAX_METADATA,
    "propertyNames": {"type": "string", "maxLength": MAX_METADATA_KEY},
    "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_VALUE},
}
Metadata = Annotated[
    dict[str, str] | None,
    BeforeValidator(_metadata),
    WithJsonSchema({"anyOf": [_METADATA_SCHEMA, {"type": "null"}]}),
]
SafetyIdentifier = Annotated[str, Field(max_length=128)]
ServiceTier = Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"]
