"""The body of POST /v1/responses, and the chat it asks for. Knows no engine."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from server.api.schemas import Body, ChatBody, JsonSchema, Message, ResponseFormat, StopStrings, wrong
from server.engine.request import MAX_PRIORITY

LOGPROBS = "message.output_text.logprobs"  # what `include` may ask for


class InputPart(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None  # an answer's own part, sent back
    logprobs: list[Any] | None = None


class InputItem(Body):
    """A message; an answer's output may be sent back as it came."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputPart], Field(min_length=1)]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


def _input(value: object) -> object:
    """Refuses here what is neither, because the error of a union would name no field."""
    if isinstance(value, str) or (isinstance(value, list) and value):
        return value
    raise wrong("it must be a string or a list of messages")


class TextFormat(JsonSchema):
    """As `response_format` of a chat, with the schema's fields beside the type."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")] | None = None  # type: ignore[assignment]

    @model_validator(mode="after")
    def _has_its_schema(self) -> "TextFormat":
        if (self.type == "json_schema") != (self.schema_ is not None and self.name is not None):
            raise wrong("it has a name and a schema exactly if its type is json_schema")
        return self


class TextSettings(Body):
    format: TextFormat | None = None


class ResponsesBody(Body):
    model: str
    input: Annotated[str | list[InputItem], BeforeValidator(_input)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    text: TextSettings | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncation: Literal["auto", "disabled"] | None = None  # auto: the context slides
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    stream: bool | None = None
    previous_response_id: str | None = None  # always refused: nothing is stored
    # Extra fields, as for chats.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StopStrings = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    adapter_scale: Annotated[float, Field(ge=0, le=8)] | None = None
    # Accepted and unused, whatever they hold. Nothing is stored.
    user: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def with_logprobs(self) -> bool:
        return bool(self.include)

    def as_chat(self) -> ChatBody:
        """The chat that answers it."""
        messages = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        if isinstance(self.input, str):
            messages.append(Message(role="user", content=self.input))
        else:
            messages += [Message(role=item.role, content=_text(item)) for item in self.input]
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
        schema: dict[str, JsonValue] = {} if wanted.schema_ is None else wanted.schema_
        return ResponseFormat(
            type="json_schema", json_schema=JsonSchema.model_validate({"name": wanted.name, "schema": schema})
        )


def _text(item: InputItem) -> str:
    return item.content if isinstance(item.content, str) else "\n".join(part.text for part in item.content)
