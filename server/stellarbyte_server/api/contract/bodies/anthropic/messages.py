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
            f"tools of the type {kind!r:.64} are not supported; give a tool of your own with 'name' and 'input_schema'"
        )
    return value


class ToolDefinition(LenientBody):
    type: Literal["custom"] | None = optional("A tool of the client's own; others are refused.")
    name: Name = required("What the model calls it by.")
    description: str | None = optional("What it does, for the model.")
    input_schema: Schema = required("The JSON Schema of its arguments, an object.")
    strict: bool | None = optional("As for the functions of chats.")
    cache_control: Cached = optional(CACHED)


class ToolUseChoice(LenientBody):
    type: Literal["auto", "any", "tool", "none"] = required(
        "Call as the model likes, at least one, the one by the name, or none."
    )
    name: Name | None = optional("The tool's name, exactly if the type is tool.")
    disable_parallel_tool_use: bool | None = optional("At most one call in an answer. Default: false.")

    @model_validator(mode="after")
    def _has_its_name(self) -> "ToolUseChoice":
        if (self.type == "tool") != (self.name is not None):
            raise wrong("it has a name exactly if its type is tool")
        return self


class ThinkingConfig(LenientBody):
    """Without effect on a model that does not think."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"] = required(
        "Whether the model thinks, where its chat template has a switch; adaptive leaves that to the template. The"
        " thinking is shown if the type is enabled or adaptive."
    )
    budget_tokens: MaxTokens | None = optional("Most tokens of thinking; needed if the type is enabled.")
    display: Literal["summarized", "omitted"] | None = optional(
        "Whether blocks of thinking have its text, which is never summarized. Default: summarized, they have."
    )

    @property
    def switch(self) -> bool | None:
        """Whether to think; None: as the template does by itself."""
        return None if self.type == "adaptive" else self.type == "enabled"

    @property
    def is_shown(self) -> bool:
        return self.type in ("enabled", "adaptive")

    @model_validator(mode="after")
    def _has_its_budget(self) -> "ThinkingConfig":
        if self.type == "enabled" and self.budget_tokens is None:
            raise wrong("it needs budget_tokens because its type is enabled")
        return self


class JsonFormat(LenientBody):
    type: Literal["json_schema"] = required("The only kind there is.")
    schema_: Annotated[Schema, Field(alias="schema")] = required("The JSON Schema of the answer.")


class OutputConfig(LenientBody):
    format: JsonFormat | None = optional("What form the answer must have. Default: any text.")
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = optional(
        "How much to think, for chat templates that read it. Otherwise it has no effect, and X-Ignored-Fields names it."
    )


class RequestMetadata(LenientBody):
    user_id: Annotated[str, Field(max_length=512)] | None = optional(UNUSED)


class CountTokensBody(ModelFields):
    """What a message is made of."""

    ignores_unknown: ClassVar = True

    messages: Annotated[list[InputMessage], Field(min_length=1), AtMost(MAX_MESSAGES), BeforeValidator(few_blocks)] = (
        required("The conversation, oldest message first. The answer goes on with a last message of the assistant.")
    )
    system: Texts | None = optional("The system prompt: a text, or blocks of text, which are joined by newlines.")
    tools: Annotated[list[Annotated[ToolDefinition, BeforeValidator(_only_custom)]], AtMost(MAX_TOOLS)] | None = (
        optional(TOOLS)
    )
    tool_choice: ToolUseChoice | None = optional("Which of the tools to call. Default: auto.")
    thinking: ThinkingConfig | None = optional(
        "Whether the model thinks before it answers. Default: as its template does by itself, and is not shown."
    )
    output_config: OutputConfig | None = optional("What the answer must be.")
    cache_control: Cached = optional(CACHED)


class MessagesBody(CountTokensBody):
    """Everything but the sampling fields is as for counting tokens."""

    max_tokens: MaxTokens = required("Most tokens of the answer.")
    temperature: OfModel[Temperature] = of_model("Higher is more random; 0 takes the likeliest token.", 1)
    top_p: OfModel[TopP] = of_model("Keep the likeliest tokens that together reach this probability.", 1)
    top_k: OfModel[TopK] = of_model("Keep this many of the likeliest tokens; 0 and -1 keep all.", "all")
    min_p: OfModel[MinP] = of_model("Keep tokens that are at least this share as likely as the likeliest.", 0)
    seed: Seed | None = optional(
        "The same seed draws the same random numbers, whatever else the server does. Default: a random one."
    )
    stop_sequences: StopStrings = optional("Texts that end the answer.")
    stream: bool | None = optional("Send the answer as server-sent events while it is generated. Default: false.")
    metadata: RequestMetadata | None = optional(UNUSED)
    service_tier: Literal["auto", "standard_only"] | None = optional(UNUSED)
    context_overflow: Literal["error", "slide"] | None = optional(
        "At the context's end: refuse (error), or let the oldest tokens go out of sight (slide). Default: as the"
        " server's --context-overflow."
    )
