"""Tools and calls of them, as requests have them."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from stellarbyte_server.api.contract.bodies.bounds import AtMost, wrong
from stellarbyte_server.api.contract.bodies.fields import ONLY_KIND, optional, required

MAX_TOOLS = 128
MAX_NAME_CHARACTERS = 64
MAX_KEYWORDS = 1000  # of a schema itself, those that only describe it included

_NAME_PATTERN = f"^[a-zA-Z0-9_-]{{1,{MAX_NAME_CHARACTERS}}}$"

Name = Annotated[str, Field(pattern=_NAME_PATTERN)]
Schema = Annotated[dict[str, Any], AtMost(MAX_KEYWORDS)]  # a JSON schema, which is checked where it is enforced


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


class Function(_Part):
    name: Name = required("What the model calls it by.")
    description: str | None = optional("What it does, for the model.")
    parameters: Schema | None = optional("The JSON Schema of its arguments. Default: it takes none.")
    strict: bool | None = optional("Every call is held to the schema, whatever this says.")


class FunctionTool(_Part):
    type: Literal["function"] = required(ONLY_KIND)
    function: Function = required("What can be called.")


class FunctionName(_Part):
    name: Name = required("The tool's name.")


class NamedTool(_Part):
    type: Literal["function"] = required(ONLY_KIND)
    function: FunctionName = required("One of the tools.")


class _SentBack(BaseModel):
    """Of an earlier answer, with whatever an SDK has added to it."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class FunctionCall(_SentBack):
    name: Name = required("The tool's name.")
    arguments: str = required("JSON, as text; an answer that was cut off may hold the beginning of one.")


class ToolCall(_SentBack):
    id: Annotated[str, Field(min_length=1, max_length=256)] = required("As it was in the answer.")
    type: Literal["function"] = required(ONLY_KIND)
    function: FunctionCall = required("What was called.")


def _choice(value: object) -> object:
    """Refuses here what is no choice, because the error of a union would name no field."""
    if value is None or value in ("none", "auto", "required"):
        return value
    if isinstance(value, dict) and value.get("type") == "function":
        function = value.get("function")
        if (
            isinstance(function, dict)
            and isinstance(name := function.get("name"), str)
            and re.fullmatch(_NAME_PATTERN, name)
        ):
            return value
    raise wrong("it must be none, auto, required or a function by its name")


Choice = Literal["none", "auto", "required"] | NamedTool
ToolChoice = Annotated[Choice, BeforeValidator(_choice)]
