"""Fields that requests to generate share are declared here once, with their bounds and meanings."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from stellarbyte_server.api.contract.bodies import unsupported
from stellarbyte_server.api.contract.bodies.body import Body
from stellarbyte_server.api.contract.bodies.bounds import AtMost, wrong
from stellarbyte_server.api.contract.bodies.fields import (
    MODEL,
    UNUSED,
    AdapterScale,
    CacheSalt,
    MaxTokens,
    MinP,
    OfModel,
    Priority,
    Seed,
    StopStrings,
    Temperature,
    TokenId,
    TopK,
    TopP,
    of_model,
    optional,
    required,
)
from stellarbyte_server.api.contract.bodies.unused import Metadata, SafetyIdentifier, ServiceTier

MAX_STOP_TOKENS = 128
MAX_BIASED_TOKENS = 1024
MAX_CHOICES = 128  # of one request: prompts, times answers to each

Penalty = Annotated[float, Field(ge=-2, le=2)]


def _biases(value: dict[str, float]) -> dict[str, float]:
    for token_id, bias in value.items():
        if not (token_id.isascii() and token_id.isdecimal() and len(token_id) < 11):
            raise wrong(f"{token_id!r:.50} is no token id")
        if not -100 <= bias <= 100:
            raise wrong(f"the bias of token {token_id} is not between -100 and 100")
    return value


class StreamOptions(Body):
    not_supported: ClassVar = unsupported.OF_STREAM_OPTIONS

    include_usage: bool | None = optional("Send the usage as a last event. Default: false.")


class ModelFields(Body):
    """What every request to the model has."""

    model: str = required(MODEL)
    priority: Priority | None = optional(
        "Lower runs first; a level is worth 10 seconds of waiting. 0 to 100, or the key's bounds. Default: 0."
    )
    cache_salt: CacheSalt | None = optional(
        "Requests of a key share the prefix cache only with those that have the same one. Default: none."
    )
    adapter_scale: AdapterScale | None = optional(
        "How strongly the adapter acts, beside its own alpha / r. Default: 1."
    )
    user: str | None = optional(UNUSED)


class CommonFields(ModelFields):
    """What chats, completions and responses share. A field that /v1/responses does not have is in GenerationBody."""

    temperature: OfModel[Temperature] = of_model("Higher is more random; 0 takes the likeliest token.", 1)
    top_p: OfModel[TopP] = of_model("Keep the likeliest tokens that together reach this probability.", 1)
    top_k: OfModel[TopK] = of_model("Keep this many of the likeliest tokens; 0 and -1 keep all.", "all")
    min_p: OfModel[MinP] = of_model("Keep tokens that are at least this share as likely as the likeliest.", 0)
    seed: Seed | None = optional(
        "The same seed draws the same random numbers, whatever else the server does. Default: a random one."
    )
    stop: StopStrings = optional("Up to 4 texts that end the answer.")
    stream: bool | None = optional("Send the answer as server-sent events while it is generated. Default: false.")
    metadata: Metadata = optional(UNUSED)
    store: bool | None = optional(UNUSED)
    service_tier: ServiceTier | None = optional(UNUSED)
    safety_identifier: SafetyIdentifier | None = optional(UNUSED)
    prompt_cache_key: str | None = optional(UNUSED)


class GenerationBody(CommonFields):
    """What both chats and completions have."""

    max_tokens: MaxTokens | None = None
    presence_penalty: Penalty | None = optional(
        "Taken from the logit of a token that the answer has already. Default: 0."
    )
    frequency_penalty: Penalty | None = optional("Taken from it for every time the answer has it. Default: 0.")
    repetition_penalty: OfModel[Annotated[float, Field(ge=0.01, le=100)]] = of_model(
        "Divides the logits of tokens in prompt and answer.", 1
    )
    logit_bias: Annotated[dict[str, float], AfterValidator(_biases), AtMost(MAX_BIASED_TOKENS)] | None = optional(
        "Token id to a number from -100 to 100 that is added to its logit; at most 1024 of them, and 16384 over all"
        " answers to a request."
    )
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = optional("Answers to each prompt. Default: 1.")
    stop_token_ids: Annotated[list[TokenId], AtMost(MAX_STOP_TOKENS)] | None = optional("Tokens that end the answer.")
    min_tokens: Annotated[int, Field(ge=0, lt=2**63)] | None = optional(
        "The answer does not end before it has so many tokens. Default: 0."
    )
    include_stop_str_in_output: bool | None = optional("Keep what ended the answer in its text. Default: false.")
    ignore_eos: bool | None = optional("Do not end at the model's end-of-sequence tokens. Default: false.")
    skip_special_tokens: bool | None = optional("Leave special tokens out of the text. Default: true.")
    add_special_tokens: bool | None = optional(
        "Add what the tokenizer adds to a text, such as a first token. Default: true."
    )
    return_token_ids: bool | None = optional("Add token_ids, and prompt_token_ids, to the answer. Default: false.")
    context_overflow: Literal["error", "slide"] | None = optional(
        "At the context's end: refuse (error), or let the oldest tokens go out of sight (slide). Default: as the"
        " server's --context-overflow."
    )
    stream_options: StreamOptions | None = optional("How to stream; only with stream.")

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return 1 if self.n is None else self.n

    @property
    def num_candidates(self) -> int:
        """Answers that are generated to each prompt."""
        return self.num_choices
