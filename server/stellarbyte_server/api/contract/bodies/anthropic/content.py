"""The content blocks of Anthropic's messages. Their unknown fields are ignored, and listed in X-Ignored-Fields."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field

from stellarbyte_server.api.contract.bodies.body import Body
from stellarbyte_server.api.contract.bodies.bounds import AtMost, wrong
from stellarbyte_server.api.contract.bodies.fields import UNUSED, OrText, optional, required
from stellarbyte_server.api.contract.bodies.tools import MAX_KEYWORDS, Name
from stellarbyte_server.api.contract.bodies.variants import variant
from stellarbyte_server.api.contract.errors import VARIANT

MAX_BLOCKS = 10_000  # of one message, or of one result
MAX_BLOCKS_AT_ONCE = 20_000  # of all messages, with those of results
_KINDS = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")
_KIND = "The kind of block."


class LenientBody(Body):
    """Unknown fields are ignored, because clients of Anthropic's API add optional ones."""

    ignores_unknown: ClassVar = True


class CacheControl(LenientBody):
    type: Literal["ephemeral"] = required("The only supported value.")
    ttl: Literal["5m", "1h"] | None = optional(UNUSED)


Cached = CacheControl | None
CACHED = "Has no effect: every prompt uses the prefix cache."


class _BlockBase(LenientBody):
    cache_control: Cached = optional(CACHED)


class TextBlock(_BlockBase):
    type: Literal["text"] = required(_KIND)
    text: str = required("The text.")


def _only_text(value: object) -> object:
    """Replaces pydantic's error for blocks of other types."""
    if isinstance(value, dict) and isinstance(kind := value.get("type"), str) and kind != "text":
        raise wrong(f"blocks of the type {kind!r:.64} are not supported here; only text is")
    return value


def _as_blocks(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Texts = Annotated[
    list[Annotated[TextBlock, BeforeValidator(_only_text)]],
    AtMost(MAX_BLOCKS),
    BeforeValidator(_as_blocks),
    OrText(),
]


class ToolUseBlock(_BlockBase):
    type: Literal["tool_use"] = required(_KIND)
    id: Annotated[str, Field(min_length=1, max_length=256)] = required("The id from the answer.")
    name: Name = required("The called tool.")
    input: Annotated[dict[str, Any], AtMost(MAX_KEYWORDS)] = required("Its arguments.")


class ToolResultBlock(_BlockBase):
    type: Literal["tool_result"] = required(_KIND)
    tool_use_id: Annotated[str, Field(min_length=1, max_length=256)] = required("The id of the call that it answers.")
    content: Texts | None = optional("A text, or blocks of text, which are joined by newlines. Default: empty.")
    is_error: bool | None = optional("The call failed: the content is shown to the model as an error. Default: false.")


class ThinkingBlock(LenientBody):
    type: Literal["thinking"] = required(_KIND)
    thinking: str = required("The model's thinking, for chat templates that show it.")
    signature: str | None = optional(UNUSED)


class RedactedThinkingBlock(LenientBody):
    """Encrypted thinking from another server; not shown to the model."""

    type: Literal["redacted_thinking"] = required(_KIND)
    data: str = required(UNUSED)


def _supported(value: object) -> object:
    if isinstance(value, dict) and isinstance(kind := value.get("type"), str) and kind not in _KINDS:
        raise wrong(f"blocks of the type {kind!r:.64} are not supported; the types are {', '.join(_KINDS)}")
    return value


def _tag(value: Any) -> str | None:
    """The union's tag, which is omitted when an error names the field."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"{VARIANT}{kind}" if isinstance(kind, str) else None


Block = Annotated[
    Annotated[TextBlock, variant("text")]
    | Annotated[ToolUseBlock, variant("tool_use")]
    | Annotated[ToolResultBlock, variant("tool_result")]
    | Annotated[ThinkingBlock, variant("thinking")]
    | Annotated[RedactedThinkingBlock, variant("redacted_thinking")],
    Discriminator(_tag, custom_error_type="value", custom_error_message="it must be an object with a type"),
    BeforeValidator(_supported),
]
Blocks = Annotated[list[Block], AtMost(MAX_BLOCKS), BeforeValidator(_as_blocks), OrText()]


def few_blocks(messages: object) -> object:
    """Checks the number of all messages' blocks before any block: a body has room for four times as many."""
    contents = [each.get("content") for each in _dicts(messages)]
    blocks = [block for content in contents for block in _dicts(content)]
    num_blocks = len(blocks) + sum(len(_dicts(block.get("content"))) for block in blocks)
    if num_blocks > MAX_BLOCKS_AT_ONCE:
        raise wrong(f"they have {num_blocks} blocks of content together; at most {MAX_BLOCKS_AT_ONCE} are allowed")
    return messages


def _dicts(value: object) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
