"""The body of POST /v1/chat/completions."""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from stellarbyte_server.api.contract.bodies import unsupported
from stellarbyte_server.api.contract.bodies.body import Body
from stellarbyte_server.api.contract.bodies.bounds import AtMost, wrong
from stellarbyte_server.api.contract.bodies.fields import MaxTokens, SchemaName, TemplateArguments, optional, required
from stellarbyte_server.api.contract.bodies.generation import GenerationBody
from stellarbyte_server.api.contract.bodies.tools import (
    MAX_TOOLS,
    Function,
    FunctionCall,
    FunctionChoice,
    Schema,
    Tool,
    ToolCall,
    ToolChoice,
)

MAX_MESSAGES = 10_000
MAX_PARTS = 10_000  # of one message's content

_TEXT_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"enum": ["text", None]}, "text": {"type": "string"}},
    "required": ["text"],
}
_REFUSAL_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "refusal"}, "refusal": {"type": "string"}},
    "required": ["type", "refusal"],
}
_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"anyOf": [_TEXT_PART_SCHEMA, _REFUSAL_PART_SCHEMA]}, "maxItems": MAX_PARTS},
        {"type": "null"},
    ]
}


def _content(value: object) -> str | None:
    """A message's text; parts are joined by newlines."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong("it must be a string or a list of text parts")
    if len(value) > MAX_PARTS:
        raise wrong(f"it has {len(value)} parts; at most {MAX_PARTS} are allowed")
    return "\n".join(_part_text(i, part) for i, part in enumerate(value))


def _part_text(i: int, part: object) -> str:
    """The text of a part; other fields are ignored, because SDKs add some."""
    if isinstance(part, dict):
        kind = part.get("type")  # of any JSON type
        text = part.get("refusal" if kind == "refusal" else "text")
        if kind in (None, "text", "refusal") and isinstance(text, str):
            return text
    raise wrong(f"part {i} is not a text part, and only those are supported")


def _no_audio(value: object) -> None:
    if value is not None:
        raise wrong("audio is not supported; send its transcript as the content")


class Message(BaseModel):
    """Unknown fields have no effect, because SDKs add fields to answers that they send back."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"] = required("Who says it.")
    content: Annotated[str | None, BeforeValidator(_content), WithJsonSchema(_CONTENT_SCHEMA)] = optional(
        "A text, or parts of text, which are joined by newlines. Optional only for the assistant."
    )
    refusal: str | None = optional("The assistant's refusal; used as the content if the message has none.")
    audio: Annotated[None, BeforeValidator(_no_audio)] = optional("Not supported.")
    name: Annotated[str, Field(max_length=256)] | None = optional("The author, if the chat template shows it.")
    tool_calls: Annotated[list[ToolCall], AtMost(MAX_TOOLS)] | None = optional("Calls that the assistant made.")
    reasoning_content: str | None = optional("The assistant's reasoning, for chat templates that show it.")
    reasoning: str | None = optional("The same as reasoning_content, which has precedence.")
    tool_call_id: Annotated[str, Field(min_length=1, max_length=256)] | None = optional(
        "The id of the call that a tool's message answers."
    )
    function_call: FunctionCall | None = optional("The deprecated form of tool_calls, of an answer to `functions`.")

    @model_validator(mode="after")
    def _fits_role(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise wrong("only a message by the assistant may have tool_calls")
        if self.function_call is not None and (self.role != "assistant" or self.tool_calls):
            raise wrong("only a message by the assistant without tool_calls may have a function_call")
        if self.role == "function" and self.name is None:
            raise wrong("a message with the role function must have a name")
        if (self.reasoning_content or self.reasoning) and self.role != "assistant":
            raise wrong("only a message by the assistant may have reasoning")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise wrong("a message must have a tool_call_id if its role is tool, and only then")
        if self.content is None and self.role != "assistant":
            raise wrong("it has no content")
        return self


STRICT = (
    "Refuse a schema that a grammar cannot enforce completely. Default: false; the answer is then checked when it"
    " is whole."
)


class JsonSchema(Body):
    name: SchemaName = required("A name; the model does not see it.")
    description: str | None = optional("For people; the model does not see it.")
    schema_: Schema | None = Field(
        default=None, alias="schema", description="The JSON Schema of the answer. Default: any JSON."
    )
    strict: bool | None = optional(STRICT)


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = required("Any text, any JSON object, or JSON by json_schema.")
    json_schema: JsonSchema | None = optional("Required if the type is json_schema, and only allowed then.")

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise wrong("it must have a json_schema if its type is json_schema, and only then")
        return self


class Prediction(Body):
    """OpenAI's predicted outputs."""

    type: Literal["content"] = required("The only kind.")
    content: Annotated[str, BeforeValidator(_content), WithJsonSchema({"anyOf": _CONTENT_SCHEMA["anyOf"][:2]})] = (
        required("A text, or parts of text, which are joined by newlines.")
    )


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Messages = Annotated[list[Message], Field(min_length=1), AtMost(MAX_MESSAGES)]
THINKING_SWITCHES = ("enable_thinking", "thinking")  # variables of templates; false makes a model answer at once
MESSAGES = "The chat so far, oldest message first."
TOOLS = "Functions and custom tools that the model may call."


class ReasoningFields(Body):
    """Fields common to chats and responses."""

    chat_template_kwargs: TemplateArguments | None = optional(
        "Variables for the chat template, such as enable_thinking; X-Ignored-Fields lists those that it does not read."
    )
    include_reasoning: bool | None = optional("Show the reasoning's text. Its tokens count in any case. Default: true.")
    max_reasoning_tokens: Annotated[int, Field(ge=0, lt=2**63)] | None = optional(
        "Maximum tokens of the reasoning; at the limit, the reasoning ends and the answer begins. Default: no limit."
    )


class ChatBody(GenerationBody, ReasoningFields):
    not_supported: ClassVar = unsupported.OF_CHATS

    max_tokens: MaxTokens | None = optional(
        "Maximum tokens of the answer; reduced to the rest of the context. Default: the rest of the context, or 4096 if"
        " the context slides."
    )
    add_special_tokens: bool | None = optional(
        "Add the tokenizer's special tokens to those of the chat template. Default: false."
    )
    messages: Messages = required(MESSAGES)
    max_completion_tokens: MaxTokens | None = optional("The same as max_tokens, under its newer name.")
    logprobs: bool | None = optional("Log-probabilities of the answer's tokens. Default: false.")
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = optional(
        "Number of likeliest tokens to list with each token. Default: 0."
    )
    response_format: ResponseFormat | None = optional("The required form of the answer. Default: any text.")
    tools: Annotated[list[Tool], AtMost(MAX_TOOLS)] | None = optional(TOOLS)
    tool_choice: ToolChoice | None = optional(
        "none: no calls; auto: the model decides; required: at least one call; or one named tool, or a selection of"
        " the tools. Default: auto."
    )
    functions: Annotated[list[Function], AtMost(MAX_TOOLS)] | None = optional("The deprecated form of tools.")
    function_call: FunctionChoice | None = optional("The deprecated form of tool_choice, for functions. Default: auto.")
    parallel_tool_calls: bool | None = optional("Whether one answer may have several calls. Default: true.")
    add_generation_prompt: bool | None = optional(
        "Begin the assistant's message. Default: true, unless the last message is continued."
    )
    continue_final_message: bool | None = optional(
        "Continue the last message, which must be the assistant's. Default: false."
    )
    prediction: Prediction | None = optional(
        "A guess of the answer, such as the text to be edited: where it is right, the answer comes faster. Its text is"
        " the same. Without effect if the server verifies no guesses, which X-Ignored-Fields then says."
    )
    reasoning_effort: ReasoningEffort | None = optional(
        "The amount of reasoning, for chat templates that read it; none also turns reasoning off if the template has a"
        " switch. Otherwise it has no effect, and X-Ignored-Fields lists it."
    )
