"""The bodies of requests to generate: which fields there are and what they may hold. Knows no engine.

A field that is known but not supported, and one that is unknown, is an error unless its value asks for nothing (see
`unsupported`). Those of `unused` have OpenAI's types and no effect. null means absent everywhere.
"""

from itertools import islice
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import from_json

from stellarbyte_server.api.contract import unsupported
from stellarbyte_server.api.contract.bounds import MAX_FIELDS, AtMost, too_large, wrong
from stellarbyte_server.api.contract.errors import bad_request, from_validation
from stellarbyte_server.api.contract.prompt_input import PromptInput, prompts_at_most
from stellarbyte_server.api.contract.unused import Metadata, SafetyIdentifier, ServiceTier
from stellarbyte_server.api.tools import MAX_TOOLS, FunctionTool, Schema, ToolCall, ToolChoice
from stellarbyte_server.protocol.request import MAX_PRIORITY

MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 1000
MAX_STOP_TOKENS = 128
MAX_BIASED_TOKENS = 1024
MAX_MESSAGES = 10_000
MAX_PARTS = 10_000  # of one message's content
MAX_IGNORED = 1000  # fields that an answer can name
MAX_CHOICES = 128  # of one request: prompts, times answers to each
MAX_TOKEN_ID = 2**31 - 1

SchemaName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=-1, lt=2**31)]  # -1 and 0: all
MinP = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Priority = Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
CacheSalt = Annotated[str, Field(min_length=1, max_length=256)]
AdapterScale = Annotated[float, Field(ge=0, le=8)]


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
_TEXT_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"enum": ["text", None]}, "text": {"type": "string"}},
    "required": ["text"],
    "additionalProperties": False,
}
_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": _TEXT_PART_SCHEMA, "maxItems": MAX_PARTS},
        {"type": "null"},
    ]
}


def _content(value: object) -> str | None:
    """A message's text; text parts are joined by newlines."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong("it must be a string or a list of text parts")
    if len(value) > MAX_PARTS:
        raise wrong(f"it has {len(value)} parts; at most {MAX_PARTS} are allowed")
    for i, part in enumerate(value):
        if (
            not isinstance(part, dict)
            or part.get("type") not in ("text", None)
            or not isinstance(part.get("text"), str)
        ):
            raise wrong(f"part {i} is not a text part, and only those are supported")
        unknown = part.keys() - {"type", "text"}
        if unknown:
            raise wrong(f"part {i} has the unknown field {min(unknown)!r}")
    return "\n".join(part["text"] for part in value)


def _false_is_none(value: object) -> object:
    return None if value is False else value


def _biases(value: dict[str, float]) -> dict[str, float]:
    for token_id, bias in value.items():
        if not (token_id.isascii() and token_id.isdecimal() and len(token_id) < 11):
            raise wrong(f"{token_id!r:.50} is no token id")
        if not -100 <= bias <= 100:
            raise wrong(f"the bias of token {token_id} is not between -100 and 100")
    return value


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)

    @classmethod
    def class_for(cls, content: dict[str, Any]) -> type[Self]:
        """The class that checks a body of this kind with that content."""
        del content
        return cls


class StreamOptions(Body):
    not_supported: ClassVar = unsupported.OF_STREAM_OPTIONS

    include_usage: bool | None = None


class GenerationBody(Body):
    """What both ways to generate share."""

    model: str
    max_tokens: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[dict[str, float], AfterValidator(_biases), AtMost(MAX_BIASED_TOKENS)] | None = None
    seed: Seed | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: StopStrings = None
    stop_token_ids: Annotated[list[TokenId], AtMost(MAX_STOP_TOKENS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    priority: Priority | None = None
    cache_salt: CacheSalt | None = None
    context_overflow: Literal["error", "slide"] | None = None
    adapter_scale: AdapterScale | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Of no effect.
    user: str | None = None
    metadata: Metadata = None
    store: bool | None = None
    service_tier: ServiceTier | None = None
    safety_identifier: SafetyIdentifier | None = None
    prompt_cache_key: str | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return 1 if self.n is None else self.n

    @property
    def num_candidates(self) -> int:
        """Answers that are generated to each prompt."""
        return self.num_choices


class CompletionBody(GenerationBody):
    not_supported: ClassVar = unsupported.OF_COMPLETIONS

    max_tokens: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    prompt: Annotated[list[PromptInput], *prompts_at_most(MAX_CHOICES)]
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = None
    logprobs: Annotated[Annotated[int, Field(ge=0, le=5)] | None, BeforeValidator(_false_is_none)] = None

    @property
    def num_candidates(self) -> int:
        return self.num_choices if self.best_of is None else self.best_of


class Message(Body):
    not_supported: ClassVar = unsupported.OF_MESSAGES

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_content), WithJsonSchema(_CONTENT_SCHEMA)] = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], AtMost(MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @model_validator(mode="after")
    def _fits_role(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise wrong("only a message of the assistant has tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise wrong("a message has a tool_call_id exactly if its role is tool")
        if self.content is None and self.role != "assistant":
            raise wrong("it has no content")
        return self


class JsonSchema(Body):
    name: SchemaName
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None  # an answer always follows its schema


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise wrong("it has a json_schema exactly if its type is json_schema")
        return self


Messages = Annotated[list[Message], Field(min_length=1), AtMost(MAX_MESSAGES)]


class ChatBody(GenerationBody):
    not_supported: ClassVar = unsupported.OF_CHATS

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[FunctionTool], AtMost(MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


BodyT = TypeVar("BodyT", bound=Body)
PlainBodyT = TypeVar("PlainBodyT", bound=BaseModel)


def parse_body(body_class: type[BodyT], text: bytes, *, warn_unknown: bool) -> tuple[BodyT, list[str]]:
    """A checked body, and the fields that were ignored (none unless `warn_unknown`); ApiError when it is refused."""
    content = _content_of(text)
    parsed = _checked(body_class.class_for(content), content)
    refused = islice(unsupported.refused_fields(parsed), MAX_IGNORED)
    if warn_unknown:
        return parsed, [path for path, _ in refused]
    for path, known in refused:
        reason = "is not supported" if known else "is unknown"
        raise bad_request(f"The field '{path}' {reason}.", path)
    return parsed, []


def parse_plain_body(body_class: type[PlainBodyT], text: bytes) -> PlainBodyT:
    """A checked body, whatever other fields it has unless its class forbids them; ApiError when it is refused."""
    return _checked(body_class, _content_of(text))


def _content_of(text: bytes) -> dict[str, Any]:
    """The fields of a body, as many as are checked in a short time; ApiError."""
    if (reason := too_large(text)) is not None:
        raise bad_request(reason)
    try:
        content = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"The body is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise bad_request("The body must be a JSON object.")
    if len(content) > MAX_FIELDS:
        raise bad_request(f"The body has {len(content)} fields; at most {MAX_FIELDS} are allowed.")
    return content


def _checked(body_class: type[PlainBodyT], content: dict[str, Any]) -> PlainBodyT:
    try:
        return body_class.model_validate(content)
    except ValidationError as error:
        raise from_validation(error) from None
