"""Tools of /v1/responses, and the choice of tools."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from stellarbyte_server.api.contract.bodies import unsupported
from stellarbyte_server.api.contract.bodies.body import Body
from stellarbyte_server.api.contract.bodies.bounds import AtMost, wrong
from stellarbyte_server.api.contract.bodies.fields import optional, required
from stellarbyte_server.api.contract.bodies.tools import MAX_TOOLS, STRICT, Name, Schema
from stellarbyte_server.api.contract.bodies.variants import TEXT, by_type, type_of, variant

_MODES = ("none", "auto", "required")


def _is_function(value: object) -> object:
    kind = type_of(value)
    if kind not in (None, "function"):
        raise wrong(f"tools of the type {kind!r:.40} are not supported; only functions are")
    return value


def _known_choice(value: object) -> object:
    """Checks the union itself, because pydantic's error would name its branches."""
    if value in _MODES or type_of(value) in ("function", "allowed_tools"):
        return value
    raise wrong("it must be none, auto, required, a function by its name or allowed_tools")


class ResponseTool(Body):
    not_supported: ClassVar = unsupported.OF_FUNCTION_TOOLS

    type: Literal["function"] = required("A function run by the client; built-in tools are not supported.")
    name: Name = required("The name for the model.")
    description: str | None = optional("A description of the function, for the model.")
    parameters: Schema | None = optional("The JSON Schema of the arguments. Default: no arguments.")
    strict: bool | None = optional(STRICT)


class NamedFunction(Body):
    type: Literal["function"] = required("One of the functions.")
    name: Name = required("Its name.")


class AllowedFunctions(Body):
    type: Literal["allowed_tools"] = required("Some of the functions.")
    mode: Literal["auto", "required"] = required("auto: the model decides; required: at least one call.")
    tools: Annotated[
        list[Annotated[NamedFunction, BeforeValidator(_is_function)]], Field(min_length=1), AtMost(MAX_TOOLS)
    ] = required("The functions that may be called.")


Tool = Annotated[ResponseTool, BeforeValidator(_is_function)]
Choice = Literal["none", "auto", "required"] | NamedFunction | AllowedFunctions
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], variant(TEXT)]
    | Annotated[NamedFunction, variant("function")]
    | Annotated[AllowedFunctions, variant("allowed_tools")],
    by_type(),
    BeforeValidator(_known_choice),
]


def shown_choice(choice: Choice | None) -> str | dict[str, Any]:
    """A choice in the format of answers."""
    if choice is None:
        return "auto"
    return choice if isinstance(choice, str) else choice.model_dump()
