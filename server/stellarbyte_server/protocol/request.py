"""What a user asks of the engine."""

from typing import Literal

import msgspec

from stellarbyte_server.protocol.adapter_reference import AdapterReference

# Most tokens of prompt and answer together when the context slides: positions fit 32 bits.
MAX_SLIDING_TOKENS = 2**31 - 1
MAX_PRIORITY = 100  # either way: what keeps any request from waiting for ever

# Codes of `RequestRejected` that mean "not now" and not "not like this".
QUEUE_FULL = "queue_full"
QUEUE_TIMEOUT = "queue_timeout"
GRAMMARS_BUSY = "grammars_busy"
RATE_LIMITED = "rate_limit_exceeded"
SHUTTING_DOWN = "shutting_down"
# That it is the server's own fault.
INTERNAL_ERROR = "internal_error"
# Those that are about the adapter.
MODEL_NOT_FOUND = "model_not_found"
ADAPTER_NOT_FOUND = "adapter_not_found"
ADAPTER_FAILED = "adapter_failed"
# That the grammar cannot be used, or not any further.
GRAMMAR_REFUSED = "grammar_refused"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen and when a choice ends. Values were checked by whoever made it."""

    max_tokens: int  # 0: only the prompt is computed
    temperature: float = 1.0  # 0: the likeliest token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    seed: int  # 64 bits; drawn at random when the user gave none
    choice: int = 0  # which of the answers to one prompt this is; each has random numbers of its own
    repetition_penalty: float = 1.0  # divides the logits of tokens in prompt and answer
    presence_penalty: float = 0.0  # taken from the logits of tokens in the answer
    frequency_penalty: float = 0.0  # the same, for every time they are there
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, what is added
    min_tokens: int = 0  # before these neither end-of-sequence nor stop tokens are sampled
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False  # the stop string, or stop token's text, stays in the answer
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    grammar: str | None = None  # what the answer must be, as llguidance writes it (Lark)
    logprobs: int | None = None  # of the tokens of the answer; how many alternatives beside each
    prompt_logprobs: int | None = None  # of the tokens of the prompt
    return_token_ids: bool = False


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and how to continue it; immutable and serialisable, so it may cross processes.

    With `pooling` there is no answer: what comes back is one vector, made of the final hidden states of its tokens.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0  # lower runs first; -MAX_PRIORITY..MAX_PRIORITY
    context_overflow: Literal["error", "slide"] = "error"  # at the context's end: refuse, or let the oldest tokens go
    adapter: AdapterReference | None = None
    adapter_scale: float = 1.0  # how strongly it acts, beside its own alpha / r
    cache_salt: str = ""  # content is shared only between requests with the same one
    follows: str | None = None  # id of an earlier request with the same prompt, which computes it for both
    pooling: Literal["last", "mean"] | None = None


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


def model_not_found(name: str | AdapterReference) -> RequestRejected:
    return RequestRejected(f"The model {str(name)!r:.200} does not exist.", MODEL_NOT_FOUND, "model")
