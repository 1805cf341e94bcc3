"""The body of POST /v1/responses."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from stellarbyte_server.api.contract.bodies import unsupported
from stellarbyte_server.api.contract.bodies.body import Body
from stellarbyte_server.api.contract.bodies.bounds import AtMost, wrong
from stellarbyte_server.api.contract.bodies.chat import MAX_MESSAGES, STRICT, TOOLS, ReasoningEffort, ReasoningFields
from stellarbyte_server.api.contract.bodies.fields import MaxTokens, OrText, SchemaName, optional, required
from stellarbyte_server.api.contract.bodies.generation import CommonFields, Penalty
from stellarbyte_server.api.contract.bodies.responses.items import InputItem
from stellarbyte_server.api.contract.bodies.responses.tools import Tool, ToolChoice
from stellarbyte_server.api.contract.bodies.tools import MAX_TOOLS, Schema
from stellarbyte_server.api.contract.bodies.unused import Metadata

LOGPROBS = "message.output_text.logprobs"  # of what `include` may ask for, there is only this to include

Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


def _as_message(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


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


class ReasoningOptions(Body):
    not_supported: ClassVar = unsupported.OF_REASONING

    effort: ReasoningEffort | None = optional(
        "How much to reason, as a chat's reasoning_effort. Where it has no effect, X-Ignored-Fields names it."
    )
    summary: Literal["auto", "concise", "detailed"] | None = optional(
        "Never made: it has no effect, and X-Ignored-Fields names it."
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = optional("The same, under its older name.")


class ResponseStreamOptions(Body):
    not_supported: ClassVar = unsupported.OF_RESPONSE_STREAMS


class ResponsesBody(CommonFields, ReasoningFields):
    not_supported: ClassVar = unsupported.OF_RESPONSES

    input: Annotated[
        list[InputItem], Field(min_length=1), AtMost(MAX_MESSAGES), BeforeValidator(_as_message), OrText()
    ] = required("A text of the user, or a list of messages, calls and their results.")
    instructions: str | None = optional("Becomes the first message, by the system.")
    max_output_tokens: MaxTokens | None = optional(
        "Most tokens of the answer. Default: to the context's end; 4096 where the context slides."
    )
    presence_penalty: Penalty | None = optional(
        "Taken from the logit of a token that the answer has already. Default: 0."
    )
    frequency_penalty: Penalty | None = optional("Taken from it for every time the answer has it. Default: 0.")
    text: TextSettings | None = optional("What form the answer must have. Default: any text.")
    tools: Annotated[list[Tool], AtMost(MAX_TOOLS)] | None = optional(TOOLS)
    tool_choice: ToolChoice | None = optional(
        "Call none, as the model likes, at least one, this one, or one of some. Default: auto."
    )
    parallel_tool_calls: bool | None = optional("Whether one answer may have several calls. Default: true.")
    max_tool_calls: Annotated[int, Field(ge=1, lt=2**63)] | None = optional(
        "Most calls of built-in tools, of which there are none: it limits nothing."
    )
    reasoning: ReasoningOptions | None = optional("How to reason.")
    include: Annotated[list[Includable], AtMost(32)] | None = optional(
        "What to add to the answer: its log-probabilities. Of the rest there is nothing to add."
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
    stream_options: ResponseStreamOptions | None = optional("How to stream; there is nothing to choose.")

    @property
    def with_logprobs(self) -> bool:
        return self.include is not None and LOGPROBS in self.include

    @property
    def effort(self) -> str | None:
        return None if self.reasoning is None else self.reasoning.effort

    @property
    def without_effect(self) -> list[str]:
        """Paths of its fields that change the answer of no model, though they could have been meant to."""
        if self.reasoning is None:
            return []
        given = self.reasoning.model_dump(exclude_none=True, include={"summary", "generate_summary"})
        return [f"reasoning.{name}" for name in given]
