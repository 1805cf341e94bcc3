"""Models of answers of /v1/responses, for the OpenAPI document and tests (see objects.py)."""

from typing import Annotated, Any, Literal

from pydantic import Field, RootModel

from stellarbyte_server.api.contract.objects import AnswerObject, Count, Left, SchemaViolation, TokenLogprob

_Nothing = Annotated[list[Any], Field(max_length=0)]


class OutputText(AnswerObject):
    type: Literal["output_text"]
    text: str
    annotations: _Nothing
    logprobs: list[TokenLogprob]


class OutputMessage(AnswerObject):
    id: str
    type: Literal["message"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class OutputFunctionCall(AnswerObject):
    id: str
    type: Literal["function_call"]
    status: Literal["in_progress", "completed", "incomplete"]
    call_id: Annotated[str, Field(description="The id by which the call's result refers to it.")]
    name: str
    arguments: Annotated[str, Field(description="JSON as the model wrote it.")]


class ReasoningText(AnswerObject):
    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(AnswerObject):
    id: str
    type: Literal["reasoning"]
    status: Literal["in_progress", "completed", "incomplete"]
    summary: _Nothing
    content: list[ReasoningText]


OutputItem = OutputReasoning | OutputMessage | OutputFunctionCall


class InputTokensDetails(AnswerObject):
    cached_tokens: Count
    cache_write_tokens: Count


class OutputTokensDetails(AnswerObject):
    reasoning_tokens: Count


class ResponseUsage(AnswerObject):
    input_tokens: Count
    input_tokens_details: InputTokensDetails
    output_tokens: Count
    output_tokens_details: OutputTokensDetails
    total_tokens: Count


class ResponseFailure(AnswerObject):
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(AnswerObject):
    reason: Literal["max_output_tokens"]


class PlainFormat(AnswerObject):
    type: Literal["text", "json_object"]


class SchemaFormat(AnswerObject):
    type: Literal["json_schema"]
    name: str
    description: Left[str]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: Left[bool]


class AnswerTextSettings(AnswerObject):
    format: PlainFormat | SchemaFormat


class AnswerTool(AnswerObject):
    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool


class FunctionChoice(AnswerObject):
    type: Literal["function"]
    name: str


class ShownAllowedTools(AnswerObject):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FunctionChoice]


class ReasoningSettings(AnswerObject):
    effort: str | None
    summary: None


class Response(AnswerObject):
    id: str
    object: Literal["response"]
    created_at: Annotated[int, Field(description="Unix seconds.")]
    completed_at: Annotated[int | None, Field(description="Unix seconds, once the status is completed.")]
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    background: Literal[False]
    frequency_penalty: float
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    presence_penalty: float
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: ReasoningSettings
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: AnswerTextSettings
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | ShownAllowedTools
    tools: list[AnswerTool]
    top_logprobs: Count
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    schema_violation: Left[SchemaViolation]
    user: str | None


# The events of a stream


class ResponseStateEvent(AnswerObject):
    """The whole response, at the start or the end of the stream."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    sequence_number: Count
    response: Response


class OutputItemEvent(AnswerObject):
    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: Count
    output_index: Count
    item: OutputItem


class ContentPartEvent(AnswerObject):
    type: Literal["response.content_part.added", "response.content_part.done"]
    sequence_number: Count
    item_id: str
    output_index: Count
    content_index: Count
    part: OutputText | ReasoningText


class TextDeltaEvent(AnswerObject):
    type: Literal["response.output_text.delta"]
    sequence_number: Count
    item_id: str
    output_index: Count
    content_index: Count
    delta: str
    logprobs: list[TokenLogprob]


class TextDoneEvent(AnswerObject):
    type: Literal["response.output_text.done"]
    sequence_number: Count
    item_id: str
    output_index: Count
    content_index: Count
    text: str
    logprobs: list[TokenLogprob]


class ReasoningDeltaEvent(AnswerObject):
    type: Literal["response.reasoning_text.delta"]
    sequence_number: Count
    item_id: str
    output_index: Count
    content_index: Count
    delta: str


class ReasoningDoneEvent(AnswerObject):
    type: Literal["response.reasoning_text.done"]
    sequence_number: Count
    item_id: str
    output_index: Count
    content_index: Count
    text: str


class ArgumentsDeltaEvent(AnswerObject):
    type: Literal["response.function_call_arguments.delta"]
    sequence_number: Count
    item_id: str
    output_index: Count
    delta: str


class ArgumentsDoneEvent(AnswerObject):
    type: Literal["response.function_call_arguments.done"]
    sequence_number: Count
    item_id: str
    output_index: Count
    name: str
    arguments: str


class ErrorEvent(AnswerObject):
    """The answer failed; `response.failed` follows."""

    type: Literal["error"]
    sequence_number: Count
    code: str | None
    message: str
    param: str | None


class ResponseEvent(
    RootModel[
        ResponseStateEvent
        | OutputItemEvent
        | ContentPartEvent
        | TextDeltaEvent
        | TextDoneEvent
        | ReasoningDeltaEvent
        | ReasoningDoneEvent
        | ArgumentsDeltaEvent
        | ArgumentsDoneEvent
        | ErrorEvent
    ]
):
    """One event of a streamed response; its `type` is also the event's name."""
