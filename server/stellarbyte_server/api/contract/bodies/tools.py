"""Tools and tool calls in requests."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, model_validator

from stellarbyte_server.api.contract.bodies.bounds import AtMost, wrong
from stellarbyte_server.api.contract.bodies.fields import optional, required
from stellarbyte_server.api.contract.bodies.variants import variant
from stellarbyte_server.api.contract.errors import VARIANT

MAX_TOOLS = 128
MAX_NAME_CHARACTERS = 64
MAX_KEYWORDS = 1000  # at a schema's top level, including annotations
MAX_GRAMMAR_CHARACTERS = 16_384  # of a custom tool

_NAME_PATTERN = f"^[a-zA-Z0-9_-]{{1,{MAX_NAME_CHARACTERS}}}$"

Name = Annotated[str, Field(pattern=_NAME_PATTERN)]
Schema = Annotated[dict[str, Any], AtMost(MAX_KEYWORDS)]  # a JSON schema, checked by `structured.json_schema`


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


# Unions are discriminated by type, so that an error names a field and not a variant.


def _type_of(value: object) -> object:
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def _form_of_tool(value: object) -> str:
    return f"{VARIANT}{'custom' if _type_of(value) == 'custom' else 'function'}"


def _form_of_choice(value: object) -> str:
    return f"{VARIANT}{'word' if isinstance(value, str) else _type_of(value)}"


def _form_of_function_choice(value: object) -> str:
    return f"{VARIANT}{'word' if isinstance(value, str) else 'function'}"


def _of_tool(value: object) -> object:
    """The type of a tool other than a custom tool."""
    if value != "function":
        raise wrong("it must be function or custom")
    return value


FunctionType = Annotated[Literal["function"], BeforeValidator(_of_tool)]

# Offered tools


STRICT = (
    "Refuse a schema that a grammar cannot enforce completely. Default: false; calls are then checked when they are"
    " whole."
)


class Function(_Part):
    name: Name = required("The name for the model.")
    description: str | None = optional("A description of the function, for the model.")
    parameters: Schema | None = optional("The JSON Schema of the arguments. Default: no arguments.")
    strict: bool | None = optional(STRICT)


class FunctionTool(_Part):
    type: FunctionType = required("A function with arguments in JSON.")
    function: Function = required("The function.")


class CustomGrammar(_Part):
    syntax: Literal["lark", "regex"] = required("The syntax of the definition.")
    definition: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARACTERS)] = required(
        "A grammar in Lark whose first rule is start, or a regular expression for the whole input."
    )


class CustomFormat(_Part):
    type: Literal["text", "grammar"] = required("Any text, or text that the grammar allows.")
    grammar: CustomGrammar | None = optional("Required if the type is grammar, and only allowed then.")

    @model_validator(mode="after")
    def _has_its_grammar(self) -> "CustomFormat":
        if (self.type == "grammar") != (self.grammar is not None):
            raise wrong("it must have a grammar if its type is grammar, and only then")
        return self


class Custom(_Part):
    name: Name = required("The name for the model.")
    description: str | None = optional("A description of the tool, for the model.")
    format: CustomFormat | None = optional("The format of the input. Default: any text.")


class CustomTool(_Part):
    type: Literal["custom"] = required("A tool with a text input.")
    custom: Custom = required("The tool.")


Tool = Annotated[
    Annotated[FunctionTool, variant("function")] | Annotated[CustomTool, variant("custom")],
    Discriminator(_form_of_tool),
]

# The choice of tools


class FunctionName(_Part):
    name: Name = required("The tool's name.")


class NamedTool(_Part):
    type: FunctionType = required("One of the functions.")
    function: FunctionName = required("Which.")

    @property
    def name(self) -> str:
        return self.function.name


class NamedCustomTool(_Part):
    type: Literal["custom"] = required("One of the custom tools.")
    custom: FunctionName = required("Which.")

    @property
    def name(self) -> str:
        return self.custom.name


Named = Annotated[
    Annotated[NamedTool, variant("function")] | Annotated[NamedCustomTool, variant("custom")],
    Discriminator(_form_of_tool),
]


class AllowedTools(_Part):
    mode: Literal["auto", "required"] = required("auto: the model decides; required: at least one call.")
    tools: Annotated[list[Named], Field(min_length=1), AtMost(MAX_TOOLS)] = required("The tools that may be called.")


class AllowedToolsChoice(_Part):
    type: Literal["allowed_tools"] = required("Some of the tools.")
    allowed_tools: AllowedTools = required("Which.")


def _known_choice(value: object) -> object:
    if value in (None, "none", "auto", "required") or _type_of(value) in ("function", "custom", "allowed_tools"):
        return value
    raise wrong("it must be none, auto, required, a function or a custom tool by its name, or allowed_tools")


Choice = Literal["none", "auto", "required"] | NamedTool | NamedCustomTool | AllowedToolsChoice
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], variant("word")]
    | Annotated[NamedTool, variant("function")]
    | Annotated[NamedCustomTool, variant("custom")]
    | Annotated[AllowedToolsChoice, variant("allowed_tools")],
    Discriminator(_form_of_choice),
    BeforeValidator(_known_choice),
]


def _known_function_choice(value: object) -> object:
    if value in (None, "none", "auto") or isinstance(value, dict | FunctionName):
        return value
    raise wrong("it must be none, auto or a function by its name")


FunctionChoice = Annotated[
    Annotated[Literal["none", "auto"], variant("word")] | Annotated[FunctionName, variant("function")],
    Discriminator(_form_of_function_choice),
    BeforeValidator(_known_function_choice),
]

# Calls in earlier answers


class _SentBack(BaseModel):
    """A call in an earlier answer; SDKs may have added fields to it."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class FunctionCall(_SentBack):
    name: Name = required("The tool's name.")
    arguments: str = required("A string of JSON; of a truncated answer, its beginning.")


class CustomCall(_SentBack):
    name: Name = required("The tool's name.")
    input: str = required("A text.")


class ToolCall(_SentBack):
    id: Annotated[str, Field(min_length=1, max_length=256)] = required("The id from the answer.")
    type: Literal["function", "custom"] | None = optional("The kind of tool. Default: function.")
    function: FunctionCall | None = optional(
        "The called function. Required if the type is function, and only allowed then."
    )
    custom: CustomCall | None = optional("The called tool. Required if the type is custom, and only allowed then.")

    @model_validator(mode="after")
    def _has_its_call(self) -> "ToolCall":
        is_custom = self.type == "custom"
        if (self.function is None) != is_custom or (self.custom is None) == is_custom:
            raise wrong("it must have exactly one of function and custom, the one that its type names")
        return self
