"""The bodies of POST /v1/messages and /v1/messages/count_tokens."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from stellarbyte_server.api.contract.bodies.anthropic.content import (
    CACHED,
    Blocks,
    Cached,
    LenientBody,
    Texts,
    few_blocks,
)
from stellarbyte_server.api.contract.bodies.bounds import AtMost, wrong
from stellarbyte_server.api.contract.bodies.chat import MAX_MESSAGES, TOOLS
from stellarbyte_server.api.contract.bodies.fields import (
    UNUSED,
    MaxTokens,
    MinP,
    OfModel,
    Seed,
    StopStrings,
    Temperature,
    TopK,
    TopP,
    of_model,
    optional,
    required,
)
from stellarbyte_server.api.contract.bodies.generation import ModelFields
from stellarbyte_server.api.contract.bodies.tools import MAX_TOOLS, Name, Schema

_ONLY_IN = {
    "tool_use": "assistant",
    "tool_result": "user",
    "thinking": "assistant",
    "redacted_thinking": "assistant",
}


class InputMessage(LenientBody):
    role: Literal["user", "assistant", "system"] = required("Who says it.")
    content: Blocks = required("A text, or blocks of content.")

    @model_validator(mode="after")
    def _fits_role(self) -> "InputMessage":
        for i, block in enumerate(self.content):
            role = _ONLY_IN.get(block.type, self.role)
            if role != self.role:
                raise wrong(f"content[{i}] is a {block.type} block, which only a message of the {role} may have")
        return self


def _only_custom(value: object) -> object:
    if isinstance(value, dict) and isinstance(kind := value.get("type"), str) and kind != "custom":
        raise wrong(
            f"tools of the type {kind!r:.64} are not supported; give a custom tool with 'name' and 'input_schema'"
        )
    return value


class ToolDefinition(LenientBody):
    type: Literal["custom"] | None = optional("A tool run by the client; other types are refused.")
    name: Name = required("The name for the model.")
    description: str | None = optional("A description of the tool, for the model.")
    input_schema: Schema = required("The JSON Schema of the arguments, an object.")
    strict: bool | None = optional("As for the functions of chats.")
    cache_control: Cached = optional(CACHED)


class ToolUseChoice(LenientBody):
    type: Literal["auto", "any", "tool", "none"] = required(
        "auto: the model decides; any: at least one call; tool: the named tool; none: no calls."
    )
    name: Name | None = optional("The tool's name. Required if the type is tool, and only allowed then.")
    disable_parallel_tool_use: bool | None = optional("At most one call in an answer. Default: false.")

    @model_validator(mode="after")
    def _has_its_name(self) -> "ToolUseChoice":
        if (self.type == "tool") != (self.name is not None):
            raise wrong("it must have a name if its type is tool, and only then")
        return self


class ThinkingConfig(LenientBody):
    """Has no effect on a model that does not think."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"] = required(
        "Whether the model thinks, if its chat template has a switch; adaptive leaves the choice to the template. The"
        " thinking is shown if the type is enabled or adaptive."
    )
    budget_tokens: MaxTokens | None = optional("Maximum tokens of thinking; required if the type is enabled.")
    display: Literal["summarized", "omitted"] | None = optional(
        "omitted: thinking blocks have no text. Default: summarized, with the whole text, which is never summarized."
    )

    @property
    def switch(self) -> bool | None:
        """Whether to think; None: the template's default."""
        return None if self.type == "adaptive" else self.type == "enabled"

    @property
    def is_shown(self) -> bool:
        return self.type in ("enabled", "adaptive")

    @model_validator(mode="after")
    def _has_its_budget(self) -> "ThinkingConfig":
        if self.type == "enabled" and self.budget_tokens is None:
            raise wrong("it must have budget_tokens because its type is enabled")
        return self


class JsonFormat(LenientBody):
    type: Literal["json_schema"] = required("The only supported value.")
    schema_: Annotated[Schema, Field(alias="schema")] = required("The JSON Schema of the answer.")


class OutputConfig(LenientBody):
    format: JsonFormat | None = optional("The required form of the answer. Default: any text.")
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = optional(
        "The amount of thinking, for chat templates that read it. Otherwise ignored, and listed in X-Ignored-Fields."
    )


class RequestMetadata(LenientBody):
    user_id: Annotated[str, Field(max_length=512)] | None = optional(UNUSED)


class CountTokensBody(ModelFields):
    """The prompt of a message."""

    ignores_unknown: ClassVar = True

    messages: Annotated[list[InputMessage], Field(min_length=1), AtMost(MAX_MESSAGES), BeforeValidator(few_blocks)] = (
        required("The conversation, oldest message first. A last message by the assistant is continued.")
    )
    system: Texts | None = optional("The system prompt: a text, or blocks of text, which are joined by newlines.")
    tools: Annotated[list[Annotated[ToolDefinition, BeforeValidator(_only_custom)]], AtMost(MAX_TOOLS)] | None = (
        optional(TOOLS)
    )
    tool_choice: ToolUseChoice | None = optional("The choice of tools. Default: auto.")
    thinking: ThinkingConfig | None = optional(
        "Whether the model thinks before it answers. Default: the template's default, and thinking is not shown."
    )
    output_config: OutputConfig | None = optional("Requirements on the answer.")
    cache_control: Cached = optional(CACHED)


class MessagesBody(CountTokensBody):
    """The fields for counting tokens, and the sampling fields."""

    max_tokens: MaxTokens = required("Maximum tokens of the answer.")
    temperature: OfModel[Temperature] = of_model("Higher is more random; 0 takes the likeliest token.", 1)
    top_p: OfModel[TopP] = of_model("Keep the likeliest tokens that together reach this probability.", 1)
    top_k: OfModel[TopK] = of_model("Keep this many of the likeliest tokens; 0 and -1 keep all.", "all")
    min_p: OfModel[MinP] = of_model("Keep tokens with at least this fraction of the likeliest token's probability.", 0)
    seed: Seed | None = optional(
        "The same seed draws the same random numbers, independently of other requests. Default: random."
    )
    stop_sequences: StopStrings = optional("Texts that end the answer.")
    stream: bool | None = optional("Send the answer as server-sent events while it is generated. Default: false.")
    metadata: RequestMetadata | None = optional(UNUSED)
    service_tier: Literal["auto", "standard_only"] | None = optional(UNUSED)
    context_overflow: Literal["error", "slide"] | None = optional(
        "At the context's end: refuse (error), or evict the oldest tokens (slide). Default: as the"
        " server's --context-overflow."
    )
