"""The body of POST /v1/responses, and the chat it asks for."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from stellarbyte_server.api.contract.bodies import unsupported
from stellarbyte_server.api.contract.bodies.body import Body
from stellarbyte_server.api.contract.bodies.bounds import AtMost, wrong
from stellarbyte_server.api.contract.bodies.chat import (
    MAX_MESSAGES,
    MAX_PARTS,
    STRICT,
    ChatBody,
    JsonSchema,
    Message,
    ResponseFormat,
)
from stellarbyte_server.api.contract.bodies.fields import ONLY_KIND, MaxTokens, OrText, SchemaName, optional, required
from stellarbyte_server.api.contract.bodies.generation import CommonFields
from stellarbyte_server.api.contract.bodies.tools import Schema
from stellarbyte_server.api.contract.bodies.unused import Metadata

MAX_LOGPROBS = 2**17  # of one part
LOGPROBS = "message.output_text.logprobs"  # what `include` may ask for
_SENT_BACK = "Of an answer that is sent back; unused."


def _as_part(value: object) -> object:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


def _as_message(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class InputPart(Body):
    type: Literal["input_text", "output_text", "text"] = required("Any of them is a text.")
    text: str = required("The text.")
    annotations: Annotated[list[Any], AtMost(0)] | None = optional(_SENT_BACK)
    logprobs: Annotated[list[Any], AtMost(MAX_LOGPROBS)] | None = optional(_SENT_BACK)


class InputItem(Body):
    """A message; an answer's output may be sent back as it came."""

    type: Literal["message"] | None = optional(ONLY_KIND)
    role: Literal["system", "developer", "user", "assistant"] = required("Who says it.")
    content: Annotated[list[InputPart], Field(min_length=1), AtMost(MAX_PARTS), BeforeValidator(_as_part), OrText()] = (
        required("A text, or parts of text, which are joined by newlines.")
    )
    id: str | None = optional(_SENT_BACK)
    status: Literal["in_progress", "completed", "incomplete"] | None = optional(_SENT_BACK)


class TextFormat(Body):
    """As `response_format` of a chat, with the schema's fields beside the type."""

    type: Literal["text", "json_object", "json_schema"] = required("Any text, any JSON object, or what schema says.")
    name: SchemaName | None = optional("A name for the schema; the model does not see it.")
    description: str | None = optional("For people; the model does not see it.")
    schema_: Schema | None = Field(default=None, alias="schema", description="The JSON Schema of the answer.")
    strict: bool | None = optional(STRICT)

    @model_validator(mode="after")
    def _has_its_schema(self) -> "TextFormat":
        if (self.type == "json_schema") != (self.schema_ is not None and self.name is not None):
            raise wrong("it has a name and a schema exactly if its type is json_schema")
        return self


class TextSettings(Body):
    not_supported: ClassVar = unsupported.OF_TEXT_SETTINGS

    format: TextFormat | None = optional("What form the answer must have. Default: any text.")


class ResponsesBody(CommonFields):
    not_supported: ClassVar = unsupported.OF_RESPONSES

    input: Annotated[
        list[InputItem], Field(min_length=1), AtMost(MAX_MESSAGES), BeforeValidator(_as_message), OrText()
    ] = required("A text of the user, or a list of messages.")
    instructions: str | None = optional("Becomes the first message, by the system.")
    max_output_tokens: MaxTokens | None = optional(
        "Most tokens of the answer. Default: to the context's end; 4096 where the context slides."
    )
    text: TextSettings | None = optional("What form the answer must have. Default: any text.")
    include: Annotated[list[Literal["message.output_text.logprobs"]], AtMost(1)] | None = optional(
        "What to add to the answer: its log-probabilities."
    )
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = optional(
        "With so many of the likeliest tokens beside each. Default: 0."
    )
    truncation: Literal["auto", "disabled"] | None = optional(
        "At the context's end: let the oldest tokens go out of sight (auto), or refuse (disabled). Default: as the"
        " server's --context-overflow."
    )
    metadata: Metadata = optional("Comes back with the response.")
    previous_response_id: str | None = optional("Always refused: nothing is stored. Send the whole conversation.")

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
            **{name: getattr(self, name) for name in CommonFields.model_fields},
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            response_format=self._response_format(),
            logprobs=self.with_logprobs,
            top_logprobs=self.top_logprobs if self.with_logprobs else None,
            context_overflow={"auto": "slide", "disabled": "error", None: None}[self.truncation],
        )

    def _response_format(self) -> ResponseFormat | None:
        wanted = None if self.text is None else self.text.format
        if wanted is None or wanted.type != "json_schema":
            return None if wanted is None else ResponseFormat(type=wanted.type)
        schema: Schema = {} if wanted.schema_ is None else wanted.schema_
        return ResponseFormat(
            type="json_schema", json_schema=JsonSchema.model_validate({"name": wanted.name, "schema": schema})
        )
