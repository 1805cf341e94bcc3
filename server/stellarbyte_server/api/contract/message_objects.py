"""Models of answers and errors of /v1/messages, for the OpenAPI document and tests (see objects.py)."""

from typing import Annotated, Any, Literal

from pydantic import Field, RootModel

from stellarbyte_server.api.contract.objects import AnswerObject, Count, Left, SchemaViolation

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class AnswerThinkingBlock(AnswerObject):
    type: Literal["thinking"]
    thinking: str
    signature: Annotated[str, Field(description="A constant; it is never verified.")]


class AnswerTextBlock(AnswerObject):
    type: Literal["text"]
    text: str


class AnswerToolUseBlock(AnswerObject):
    type: Literal["tool_use"]
    id: str
    name: str
    input: Annotated[dict[str, Any], Field(description="The arguments; of a truncated call, its complete part.")]


AnswerBlock = AnswerThinkingBlock | AnswerTextBlock | AnswerToolUseBlock


class MessageTokenDetails(AnswerObject):
    thinking_tokens: Count


class MessageUsage(AnswerObject):
    input_tokens: Annotated[Count, Field(description="Prompt tokens that were not in the prefix cache.")]
    cache_creation_input_tokens: Annotated[
        Literal[0], Field(description="Always 0: every prompt is cached without a request for it.")
    ]
    cache_read_input_tokens: Annotated[Count, Field(description="Prompt tokens that were in the prefix cache.")]
    output_tokens: Count
    output_tokens_details: Left[
        Annotated[MessageTokenDetails, Field(description="Only of a model that marks its reasoning.")]
    ]
    evicted_tokens: Left[Annotated[int, Field(ge=1, description="Tokens evicted because the context slid.")]]


class AssistantMessage(AnswerObject):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: Annotated[str | None, Field(description="The stop sequence that ended the answer.")]
    usage: MessageUsage
    schema_violation: Left[SchemaViolation]


class MessageTokenCount(AnswerObject):
    input_tokens: Count


# Errors


class MessagesErrorDetail(AnswerObject):
    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "request_too_large",
        "rate_limit_error",
        "api_error",
        "overloaded_error",
    ]
    message: Annotated[str, Field(description="One sentence for the user.")]


class MessagesError(AnswerObject):
    """Every error of these routes, and the last event of a failed stream."""

    type: Literal["error"]
    error: MessagesErrorDetail
    request_id: str | None


# The events of a stream


class MessageStartEvent(AnswerObject):
    type: Literal["message_start"]
    message: AssistantMessage


class BlockStartEvent(AnswerObject):
    type: Literal["content_block_start"]
    index: Count
    content_block: AnswerBlock


class ThinkingPart(AnswerObject):
    type: Literal["thinking_delta"]
    thinking: str


class SignaturePart(AnswerObject):
    """Sent before the end of a thinking block."""

    type: Literal["signature_delta"]
    signature: str


class AnswerTextPart(AnswerObject):
    type: Literal["text_delta"]
    text: str


class InputJsonPart(AnswerObject):
    type: Literal["input_json_delta"]
    partial_json: str


class BlockDeltaEvent(AnswerObject):
    type: Literal["content_block_delta"]
    index: Count
    delta: ThinkingPart | SignaturePart | AnswerTextPart | InputJsonPart


class BlockStopEvent(AnswerObject):
    type: Literal["content_block_stop"]
    index: Count


class MessageEnd(AnswerObject):
    stop_reason: StopReason
    stop_sequence: str | None
    schema_violation: Left[SchemaViolation]


class MessageDeltaEvent(AnswerObject):
    type: Literal["message_delta"]
    delta: MessageEnd
    usage: MessageUsage


class MessageStopEvent(AnswerObject):
    type: Literal["message_stop"]


class PingEvent(AnswerObject):
    """Sent when no other event has been sent for a while."""

    type: Literal["ping"]


class MessageEvent(
    RootModel[
        MessageStartEvent
        | BlockStartEvent
        | BlockDeltaEvent
        | BlockStopEvent
        | MessageDeltaEvent
        | MessageStopEvent
        | PingEvent
        | MessagesError
    ]
):
    """One event of a streamed message; its `type` is also the event's name."""
