"""The body of POST /v1/responses, and the chat it asks for. Knows no engine."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from stellarbyte_server.api.contract import unsupported
from stellarbyte_server.api.contract.bounds import AtMost, wrong
from stellarbyte_server.api.contract.schemas import (
    MAX_MESSAGES,
    MAX_PARTS,
    AdapterScale,
    Body,
    CacheSalt,
    ChatBody,
    JsonSchema,
    Message,
    MinP,
    Priority,
    ResponseFormat,
    SchemaName,
    Seed,
    StopStrings,
    Temperature,
    TopK,
    TopP,
)
from stellarbyte_server.api.contract.unused import Metadata, SafetyIdentifier, ServiceTier
from stellarbyte_server.api.tools import Schema

MAX_LOGPROBS = 2**17  # of one part
LOGPROBS = "message.output_text.logprobs"  # what `include` may ask for


class _OrText:
    """Says in the document that a list may also be a text. A union would name its branches in errors."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(schema)]}


def _as_part(value: object) -> object:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


def _as_message(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class InputPart(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[Any], AtMost(0)] | None = None  # an answer's own part, sent back
    logprobs: Annotated[list[Any], AtMost(MAX_LOGPROBS)] | None = None


class InputItem(Body):
    """A message; an answer's output may be sent back as it came."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[InputPart], Field(min_length=1), AtMost(MAX_PARTS), BeforeValidator(_as_part), _OrText()]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class TextFormat(Body):
    """As `response_format` of a chat, with the schema's fields beside the type."""

    type: Literal["text", "json_object", "json_schema"]
    name: SchemaName | None = None
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "TextFormat":
        if (self.type == "json_schema") != (self.schema_ is not None and self.name is not None):
            raise wrong("it has a name and a schema exactly if its type is json_schema")
        return self


class TextSettings(Body):
    not_supported: ClassVar = unsupported.OF_TEXT_SETTINGS

    format: TextFormat | None = None


class ResponsesBody(Body):
    not_supported: ClassVar = unsupported.OF_RESPONSES

    model: str
    input: Annotated[
        list[InputItem], Field(min_length=1), AtMost(MAX_MESSAGES), BeforeValidator(_as_message), _OrText()
    ]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    text: TextSettings | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], AtMost(1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncation: Literal["auto", "disabled"] | None = None  # auto: the context slides
    metadata: Metadata = None
    stream: bool | None = None
    previous_response_id: str | None = None  # always refused: nothing is stored
    # Extra fields, as for chats.
    top_k: TopK | None = None
    min_p: MinP | None = None
    seed: Seed | None = None
    stop: StopStrings = None
    priority: Priority | None = None
    cache_salt: CacheSalt | None = None
    adapter_scale: AdapterScale | None = None
    # Of no effect. Nothing is stored.
    user: str | None = None
    store: bool | None = None
    service_tier: ServiceTier | None = None
    safety_identifier: SafetyIdentifier | None = None
    prompt_cache_key: str | None = None

    @property
    def with_logprobs(self) -> bool:
        return bool(self.include)

    def as_chat(self) -> ChatBody:
        """The chat that answers it."""
        messages = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        messages += [
            Message(role=item.role, content="\n".join(part.text for part in item.content)) for item in self.input
        ]
        return ChatBody(
            model=self.model,
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            response_format=self._response_format(),
            logprobs=self.with_logprobs,
            top_logprobs=self.top_logprobs if self.with_logprobs else None,
            context_overflow={"auto": "slide", "disabled": "error", None: None}[self.truncation],
            stream=self.stream,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            stop=self.stop,
            priority=self.priority,
            cache_salt=self.cache_salt,
            adapter_scale=self.adapter_scale,
        )

    def _response_format(self) -> ResponseFormat | None:
        wanted = None if self.text is None else self.text.format
        if wanted is None or wanted.type != "json_schema":
            return None if wanted is None else ResponseFormat(type=wanted.type)
        schema: Schema = {} if wanted.schema_ is None else wanted.schema_
        return ResponseFormat(
            type="json_schema", json_schema=JsonSchema.model_validate({"name": wanted.name, "schema": schema})
        )
