"""Tools and calls of them, as requests have them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, model_validator

from stellarbyte_server.api.contract.bodies.bounds import AtMost, wrong
from stellarbyte_server.api.contract.bodies.fields import optional, required
from stellarbyte_server.api.contract.bodies.variants import variant
from stellarbyte_server.api.contract.errors import VARIANT

MAX_TOOLS = 128
MAX_NAME_CHARACTERS = 64
MAX_KEYWORDS = 1000  # of a schema itself, those that only describe it included
MAX_GRAMMAR_CHARACTERS = 16_384  # of a custom tool

_NAME_PATTERN = f"^[a-zA-Z0-9_-]{{1,{MAX_NAME_CHARACTERS}}}$"

Name = Annotated[str, Field(pattern=_NAME_PATTERN)]
Schema = Annotated[dict[str, Any], AtMost(MAX_KEYWORDS)]  # a JSON schema, which is checked where it is enforced


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


# The forms of a union are told apart by their types, so that an error names a field, and not a form.


def _type_of(value: object) -> object:
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def _form_of_tool(value: object) -> str:
    return f"{VARIANT}{'custom' if _type_of(value) == 'custom' else 'function'}"


def _form_of_choice(value: object) -> str:
    return f"{VARIANT}{'word' if isinstance(value, str) else _type_of(value)}"


def _form_of_function_choice(value: object) -> str:
    return f"{VARIANT}{'word' if isinstance(value, str) else 'function'}"


def _of_tool(value: object) -> object:
    """Of what is no custom tool."""
    if value != "function":
        raise wrong("it must be function or custom")
    return value


FunctionType = Annotated[Literal["function"], BeforeValidator(_of_tool)]

# What is offered


STRICT = (
    "Refuse a schema of which a grammar cannot enforce every part. Default: false; calls are then checked when they are"
    " whole."
)


class Function(_Part):
    name: Name = required("What the model calls it by.")
    description: str | None = optional("What it does, for the model.")
    parameters: Schema | None = optional("The JSON Schema of its arguments. Default: it takes none.")
    strict: bool | None = optional(STRICT)


class FunctionTool(_Part):
    type: FunctionType = required("A function with arguments in JSON.")
    function: Function = required("What can be called.")


class CustomGrammar(_Part):
    syntax: Literal["lark", "regex"] = required("How it is written.")
    definition: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARACTERS)] = required(
        "A grammar in Lark whose first rule is start, or a regular expression for the whole input."
    )


class CustomFormat(_Part):
    type: Literal["text", "grammar"] = required("Any text, or what the grammar allows.")
    grammar: CustomGrammar | None = optional("Exactly if the type is grammar.")

    @model_validator(mode="after")
    def _has_its_grammar(self) -> "CustomFormat":
        if (self.type == "grammar") != (self.grammar is not None):
            raise wrong("it has a grammar exactly if its type is grammar")
        return self


class Custom(_Part):
    name: Name = required("What the model calls it by.")
    description: str | None = optional("What it does, for the model.")
    format: CustomFormat | None = optional("What its input is. Default: any text.")


class CustomTool(_Part):
    type: Literal["custom"] = required("A tool with a text as its input.")
    custom: Custom = required("What can be called.")


Tool = Annotated[
    Annotated[FunctionTool, variant("function")] | Annotated[CustomTool, variant("custom")],
    Discriminator(_form_of_tool),
]

# Which of it is called


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
    mode: Literal["auto", "required"] = required("Call them as the model likes, or at least one.")
    tools: Annotated[list[Named], Field(min_length=1), AtMost(MAX_TOOLS)] = required("Those that may be called.")


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

# What was called


class _SentBack(BaseModel):
    """Of an earlier answer, with whatever an SDK has added to it."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class FunctionCall(_SentBack):
    name: Name = required("The tool's name.")
    arguments: str = required("JSON, as text; an answer that was cut off may hold the beginning of one.")


class CustomCall(_SentBack):
    name: Name = required("The tool's name.")
    input: str = required("A text.")


class ToolCall(_SentBack):
    id: Annotated[str, Field(min_length=1, max_length=256)] = required("As it was in the answer.")
    type: Literal["function", "custom"] | None = optional("Of which kind the tool is. Default: function.")
    function: FunctionCall | None = optional("What was called, exactly if the type is function.")
    custom: CustomCall | None = optional("What was called, exactly if the type is custom.")

    @model_validator(mode="after")
    def _has_its_call(self) -> "ToolCall":
        is_custom = self.type == "custom"
        if (self.function is None) != is_custom or (self.custom is None) == is_custom:
            raise wrong("it has a function exactly if its type is function, and a custom exactly if that is its type")
        return self
