"""Requests to the engine."""

from typing import Literal

import msgspec

from stellarbyte_server.protocol.adapter_reference import AdapterMix, AdapterReference

# Most tokens of prompt and answer together if the context slides: positions fit 32 bits.
MAX_SLIDING_TOKENS = 2**31 - 1
MAX_PRIORITY = 100  # bounded in both directions, so that no request waits for ever
BACKGROUND_PRIORITY = 10_000  # of batches: after all other requests

# Codes of `RequestRejected` for requests that may succeed later.
QUEUE_FULL = "queue_full"
QUEUE_TIMEOUT = "queue_timeout"
GRAMMARS_BUSY = "grammars_busy"
RATE_LIMITED = "rate_limit_exceeded"
SHUTTING_DOWN = "shutting_down"
# Codes for faults of the server.
INTERNAL_ERROR = "internal_error"
# Codes about the adapter.
MODEL_NOT_FOUND = "model_not_found"
MODEL_NOT_ALLOWED = "model_not_allowed"  # for the key
ADAPTER_NOT_FOUND = "adapter_not_found"
ADAPTER_FAILED = "adapter_failed"
ADAPTER_LOADING = "adapter_loading"  # another call is loading it
# Codes of grammars that cannot be used, or not continued.
GRAMMAR_REFUSED = "grammar_refused"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling and the end of an answer. The creator has validated the values."""

    max_tokens: int  # 0: only the prompt is computed
    temperature: float = 1.0  # 0: the likeliest token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    seed: int  # 64 bits; random if the user gave none
    choice: int = 0  # number of this answer among those to one prompt; each has its own random numbers
    repetition_penalty: float = 1.0  # divides the logits of tokens in prompt and answer
    presence_penalty: float = 0.0  # subtracted from the logits of tokens in the answer
    frequency_penalty: float = 0.0  # the same, for each occurrence
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, number added
    min_tokens: int = 0  # until then neither end-of-sequence nor stop tokens are sampled
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False  # keep the stop string, or stop token's text, in the answer
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    grammar: str | None = None  # grammar of the answer, in llguidance's Lark syntax
    logprobs: int | None = None  # alternatives for each token of the answer
    prompt_logprobs: int | None = None  # the same for tokens of the prompt
    return_token_ids: bool = False


class Reasoning(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How a model marks its reasoning, which comes before its answer, and how long it may be.

    The first character of a mark is in no other place of it.
    """

    start: str
    end: str
    start_token_ids: tuple[int, ...]  # as the tokenizer writes the mark, perhaps with white space before it
    end_token_ids: tuple[int, ...]
    start_id: int | None = None  # the token that is the mark; None: it is text, however it is divided into tokens
    end_id: int | None = None
    is_open: bool = False  # the prompt ends with the start mark
    max_tokens: int | None = None  # of the reasoning, marks not counted


class Channels(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How a model writes messages in channels, harmony's format, and how long those with its reasoning may be.

    A message is START, its role, CHANNEL, its channel, perhaps a recipient and CONSTRAIN with a type of content,
    MESSAGE, its text, and END. RETURN or CALL in the place of END ends the answer. Marks are tokens, never text.
    """

    start_id: int
    channel_id: int
    message_id: int
    end_id: int
    final_ids: tuple[int, ...]  # RETURN and CALL
    constrain_id: int | None = None
    role_token_ids: tuple[int, ...]  # "assistant" as the tokenizer writes it, like the next two
    analysis_token_ids: tuple[int, ...]
    commentary_token_ids: tuple[int, ...]
    begun: tuple[int, ...] = ()  # the message that the prompt has begun, up to MESSAGE; (): it has ended all messages
    may_comment: bool = True  # a grammar allows messages to the user before the answer
    max_tokens: int | None = None  # of the reasoning, headers and marks not counted


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and how to continue it; immutable and serialisable.

    With `pooling` the result is one vector, computed from the final hidden states of the prompt's tokens, or the logits
    after the last one.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0  # lower runs first; -MAX_PRIORITY..MAX_PRIORITY, or BACKGROUND_PRIORITY
    context_overflow: Literal["error", "slide"] = "error"  # at the context's end: refuse, or evict the oldest tokens
    adapter: AdapterReference | AdapterMix | None = None
    adapter_scale: float = 1.0  # factor on top of its own alpha / r
    may_use_base: bool = True  # the answer may be the model's alone, if the prompt does not invoke the adapter
    cache_salt: str = ""  # cached blocks are shared only between requests with the same salt
    follows: str | None = None  # id of an earlier request with the same prompt, which computes the prompt for both
    caller: str = ""  # a hash of the caller, which decides among versions that share an adapter's name
    pooling: Literal["last", "mean", "logits"] | None = None
    reasoning: Reasoning | Channels | None = None  # None: all that is generated is the answer
    speculative: bool = True  # guesses of next tokens may be verified together; the answer is the same
    prediction_token_ids: tuple[int, ...] = ()  # the user's guess of the answer

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The adapter's name; of a mix, the names of its parts; none without an adapter."""
        if isinstance(self.adapter, AdapterMix):
            return tuple(reference.name for reference, _ in self.adapter.parts)
        return () if self.adapter is None else (self.adapter.name,)


class RequestRejected(Exception):
    """The engine will not run a request; str() is one sentence for the user.

    `code` is the error code of the HTTP contract (for instance "context_length_exceeded").
    """

    def __init__(
        self, message: str, code: str | None = None, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


def adapter_loading(name: str) -> RequestRejected:
    """Another call is loading an adapter under this name."""
    message = f"The adapter {name!r:.200} is being loaded; try again when that has ended."
    return RequestRejected(message, ADAPTER_LOADING, "lora_name")


def model_not_found(name: str | AdapterReference | AdapterMix) -> RequestRejected:
    return RequestRejected(
        f"The model {str(name)!r:.200} does not exist; GET /v1/models lists those that do.", MODEL_NOT_FOUND, "model"
    )
