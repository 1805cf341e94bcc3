"""Models of answers, for the document at /openapi.json and for tests.

Answers are not made from these models, because encoding bytes directly is much faster. `Left` marks a field that is
omitted when it has no value; all other fields are always present. Other modules have the objects of /v1/responses,
/v1/messages, adapters, batches and rankings.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

T = TypeVar("T")
Left = Annotated[T | SkipJsonSchema[None], Field(default=None)]

FinishReason = Literal["stop", "length", "tool_calls"]
ChatFinishReason = FinishReason | Literal["function_call"]
StopReason = Annotated[str | int, Field(description="The stop string, or the id of the stop token, at the end.")]
SchemaViolation = Annotated[
    str,
    Field(description="How the whole answer violates a schema that is not strict: one sentence, for the user."),
]
TokenIds = list[Annotated[int, Field(ge=0)]]
Count = Annotated[int, Field(ge=0)]


class AnswerObject(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


# Errors


class ErrorDetail(AnswerObject):
    message: Annotated[str, Field(description="One sentence for the user.")]
    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "request_too_large",
        "rate_limit_error",
        "server_error",
    ]
    param: Annotated[str | None, Field(description="The invalid field, such as messages[0].role.")]
    code: str | None


class ErrorBody(AnswerObject):
    """Every error, and the last event of a failed stream."""

    error: ErrorDetail


# Common to generated answers


class PromptTokensDetails(AnswerObject):
    cached_tokens: Annotated[Count, Field(description="Prompt tokens that were in the prefix cache.")]
    adapted_tokens: Left[
        Annotated[
            int,
            Field(
                ge=0,
                description="With an activated adapter: prompt tokens from its invocation on; 0: the prompt does not"
                " contain the invocation, so the model answered without the adapter.",
            ),
        ]
    ]


class CompletionTokensDetails(AnswerObject):
    reasoning_tokens: Left[Annotated[int, Field(ge=0, description="Tokens of the reasoning, without its marks.")]]
    accepted_prediction_tokens: Left[
        Annotated[int, Field(ge=0, description="With prediction: tokens of it that are in the answers.")]
    ]
    rejected_prediction_tokens: Left[Annotated[int, Field(ge=0, description="With prediction: its other tokens.")]]


class Usage(AnswerObject):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: Left[CompletionTokensDetails]
    evicted_tokens: Left[Annotated[int, Field(ge=1, description="Tokens evicted because the context slid.")]]


class _Answer(AnswerObject):
    id: str
    created: Annotated[int, Field(description="Unix seconds.")]
    model: str
    system_fingerprint: Annotated[str, Field(description="Names the weights, the adapter and the numeric mode.")]


class NumericMode(AnswerObject):
    """On which the last bits of an answer's numbers depend."""

    device: str
    processor: str
    dtype: str
    quantization: str
    kv_cache_dtype: str
    deterministic: Annotated[bool, Field(description="Of --deterministic: other requests have no effect.")]
    tensor_parallel_size: Annotated[int, Field(description="Processes whose sums are added.")]


class Receipt(AnswerObject):
    """What is needed to compute answers again, and what they then are."""

    version: Literal[1]
    path: str
    body: Annotated[dict[str, Any], Field(description="The request, with a seed.")]
    weights: Annotated[str, Field(description="SHA-256 of the weights.")]
    adapter: Annotated[str | None, Field(description="SHA-256 of the adapter.")]
    adapter_scale: float
    numeric_mode: NumericMode
    versions: dict[str, str]
    sampling: Annotated[dict[str, Any], Field(description="Of the request, else the model's defaults.")]
    prompts: Annotated[list[str], Field(description="SHA-256 of the token ids of each prompt.")]
    answers: Annotated[list[TokenIds], Field(description="Token ids of all answers, candidates of best_of among them.")]


# /v1/completions


class CompletionLogprobs(AnswerObject):
    """Lists of one length: an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(AnswerObject):
    logprob: float
    rank: Annotated[int, Field(ge=1, description="Its place among all tokens; 1 is the likeliest.")]
    decoded_token: str


PromptLogprobs = Annotated[
    list[dict[str, PromptLogprob] | None],
    Field(description="With prompt_logprobs: for each token of the prompt, by token ids; the first token has none."),
]


class CompletionChoice(AnswerObject):
    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason | None
    schema_violation: Left[SchemaViolation]
    token_ids: Left[TokenIds]
    prompt_token_ids: Left[TokenIds]
    prompt_logprobs: Left[PromptLogprobs]


class Completion(_Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage
    receipt: Left[Receipt]


class CompletionChunkChoice(AnswerObject):
    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: StopReason | None = None
    schema_violation: Left[SchemaViolation]
    token_ids: Left[TokenIds]
    prompt_token_ids: Left[TokenIds]


class CompletionChunk(_Answer):
    """With stream_options.include_usage, `usage` is null in all chunks but the last, which has no choices."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


# /v1/chat/completions


class TopLogprob(AnswerObject):
    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, le=255)]] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(AnswerObject):
    content: list[TokenLogprob] | None
    refusal: None


class AnswerFunctionCall(AnswerObject):
    name: str
    arguments: Annotated[str, Field(description="JSON as the model wrote it.")]


class AnswerToolCall(AnswerObject):
    id: str
    type: Literal["function"]
    function: AnswerFunctionCall


class AnswerCustomCall(AnswerObject):
    name: str
    input: str


class AnswerCustomToolCall(AnswerObject):
    id: str
    type: Literal["custom"]
    custom: AnswerCustomCall


class AnswerMessage(AnswerObject):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    annotations: Annotated[list[None], Field(max_length=0)]
    reasoning_content: Left[Annotated[str, Field(description="The model's text before its answer.")]]
    reasoning: Left[Annotated[str, Field(description="The same as reasoning_content.")]]
    tool_calls: Left[list[AnswerToolCall | AnswerCustomToolCall]]
    function_call: Left[Annotated[AnswerFunctionCall, Field(description="Instead of tool_calls, for `functions`.")]]


class ChatChoice(AnswerObject):
    index: Count
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: StopReason | None
    schema_violation: Left[SchemaViolation]
    token_ids: Left[TokenIds]


class ChatCompletion(_Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    receipt: Left[Receipt]
    prompt_token_ids: Left[TokenIds]
    prompt_logprobs: Left[PromptLogprobs]


class FunctionCallDelta(AnswerObject):
    name: Left[str]
    arguments: Left[str]


class CustomCallDelta(AnswerObject):
    name: Left[str]
    input: Left[str]


class ToolCallDelta(AnswerObject):
    index: Count
    id: Left[str]
    type: Left[Literal["function", "custom"]]
    function: Left[FunctionCallDelta]
    custom: Left[CustomCallDelta]


class ChatDelta(AnswerObject):
    role: Left[Literal["assistant"]]
    content: str | None = None
    refusal: None = None
    reasoning_content: Left[str]
    reasoning: Left[str]
    tool_calls: Left[list[ToolCallDelta]]
    function_call: Left[FunctionCallDelta]


class ChatChunkChoice(AnswerObject):
    index: Count
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: StopReason | None = None
    schema_violation: Left[SchemaViolation]
    token_ids: Left[TokenIds]


class ChatCompletionChunk(_Answer):
    """With stream_options.include_usage, `usage` is null in all chunks but the last, which has no choices."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: Left[TokenIds]


# /v1/embeddings


class Embedding(AnswerObject):
    object: Literal["embedding"]
    index: Count
    embedding: Annotated[list[float] | str, Field(description="Numbers, or float32 as base64 if requested.")]


class EmbeddingUsage(AnswerObject):
    prompt_tokens: Count
    total_tokens: Count


class EmbeddingList(AnswerObject):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


# Models, tokens, state


class ModelCard(AnswerObject):
    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["stellarbyte"]
    root: str
    parent: Annotated[str | None, Field(description="The model that an adapter belongs to.")]
    max_model_len: int
    content_hash: Annotated[str | None, Field(description="Of the weights; null until an adapter has been read.")]


class ModelList(AnswerObject):
    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(AnswerObject):
    count: Count
    max_model_len: int
    tokens: TokenIds
    token_strs: list[str] | None


class Detokenized(AnswerObject):
    prompt: str


class Health(AnswerObject):
    status: Literal["ok", "degraded"]
    message: str | None = None  # with degraded: how many replicas serve


class Ready(AnswerObject):
    status: Literal["ready"]


class Version(AnswerObject):
    version: str
