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

LOGPROBS = "message.output_text.logprobs"  # the only value of `include` with an effect

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
    """As `response_format` of a chat, with the schema's fields at the same level as the type."""

    type: Literal["text", "json_object", "json_schema"] = required("Any text, any JSON object, or JSON by schema.")
    name: SchemaName | None = optional("A name for the schema; the model does not see it.")
    description: str | None = optional("For people; the model does not see it.")
    schema_: Schema | None = Field(default=None, alias="schema", description="The JSON Schema of the answer.")
    strict: bool | None = optional(STRICT)

    @model_validator(mode="after")
    def _has_its_schema(self) -> "TextFormat":
        if (self.type == "json_schema") != (self.schema_ is not None and self.name is not None):
            raise wrong("it must have a name and a schema if its type is json_schema, and only then")
        return self


class TextSettings(Body):
    not_supported: ClassVar = unsupported.OF_TEXT_SETTINGS

    format: TextFormat | None = optional("The required form of the answer. Default: any text.")


class ReasoningOptions(Body):
    not_supported: ClassVar = unsupported.OF_REASONING

    effort: ReasoningEffort | None = optional(
        "The amount of reasoning, as a chat's reasoning_effort. If it has no effect, X-Ignored-Fields lists it."
    )
    summary: Literal["auto", "concise", "detailed"] | None = optional(
        "Not supported: it has no effect, and X-Ignored-Fields lists it."
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = optional("The deprecated name of summary.")


class ResponseStreamOptions(Body):
    not_supported: ClassVar = unsupported.OF_RESPONSE_STREAMS


class ResponsesBody(CommonFields, ReasoningFields):
    not_supported: ClassVar = unsupported.OF_RESPONSES

    input: Annotated[
        list[InputItem], Field(min_length=1), AtMost(MAX_MESSAGES), BeforeValidator(_as_message), OrText()
    ] = required("A text by the user, or a list of messages, calls and their results.")
    instructions: str | None = optional("The text of a first message by the system.")
    max_output_tokens: MaxTokens | None = optional(
        "Maximum tokens of the answer. Default: the rest of the context, or 4096 if the context slides."
    )
    presence_penalty: Penalty | None = optional(
        "Subtracted from the logits of tokens that the answer already contains. Default: 0."
    )
    frequency_penalty: Penalty | None = optional(
        "Subtracted from a token's logit for each occurrence in the answer. Default: 0."
    )
    text: TextSettings | None = optional("The required form of the answer. Default: any text.")
    tools: Annotated[list[Tool], AtMost(MAX_TOOLS)] | None = optional(TOOLS)
    tool_choice: ToolChoice | None = optional(
        "none: no calls; auto: the model decides; required: at least one call; or one named function, or a selection of"
        " the functions. Default: auto."
    )
    parallel_tool_calls: bool | None = optional("Whether one answer may have several calls. Default: true.")
    max_tool_calls: Annotated[int, Field(ge=1, lt=2**63)] | None = optional(
        "Has no effect: it limits calls of built-in tools, which this server does not have."
    )
    reasoning: ReasoningOptions | None = optional("How to reason.")
    include: Annotated[list[Includable], AtMost(32)] | None = optional(
        "Additions to the answer: its log-probabilities. Other values have no effect."
    )
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = optional(
        "Number of likeliest tokens to list with each token. Default: 0."
    )
    truncation: Literal["auto", "disabled"] | None = optional(
        "At the context's end: evict the oldest tokens (auto), or refuse (disabled). Default: as the"
        " server's --context-overflow."
    )
    metadata: Metadata = optional("Returned with the response.")
    previous_response_id: str | None = optional(
        "Always refused: responses are not stored. Send the whole conversation."
    )
    stream_options: ResponseStreamOptions | None = optional("Has no effect.")

    @property
    def with_logprobs(self) -> bool:
        return self.include is not None and LOGPROBS in self.include

    @property
    def effort(self) -> str | None:
        return None if self.reasoning is None else self.reasoning.effort

    @property
    def without_effect(self) -> list[str]:
        """Paths of given fields that have no effect on any model."""
        if self.reasoning is None:
            return []
        given = self.reasoning.model_dump(exclude_none=True, include={"summary", "generate_summary"})
        return [f"reasoning.{name}" for name in given]
