"""Fields common to requests that generate text, with their bounds and descriptions."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, PlainValidator, WithJsonSchema, model_validator

from stellarbyte_server.api.contract.bodies import unsupported
from stellarbyte_server.api.contract.bodies.body import Body
from stellarbyte_server.api.contract.bodies.bounds import AtMost, wrong
from stellarbyte_server.api.contract.bodies.fields import (
    MODEL,
    UNUSED,
    USER,
    AdapterId,
    AdapterScale,
    AdapterSource,
    CacheSalt,
    MaxTokens,
    MinP,
    MixedName,
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
from stellarbyte_server.api.contract.bodies.tools import MAX_KEYWORDS
from stellarbyte_server.api.contract.bodies.unused import Metadata, SafetyIdentifier, ServiceTier
from stellarbyte_server.protocol.adapter_reference import MAX_MIXED_ADAPTERS

MAX_STOP_TOKENS = 128
MAX_CONSTRAINED = 1000  # texts of a choice
MAX_PATTERN = 4096  # characters, also of each text of a choice
MAX_GRAMMAR = 65_536
MAX_BIASED_TOKENS = 1024
MAX_CHOICES = 128  # of one request: prompts, times answers to each

Penalty = Annotated[float, Field(ge=-2, le=2)]


def _biases(value: dict[str, float]) -> dict[str, float]:
    for token_id, bias in value.items():
        if not (token_id.isascii() and token_id.isdecimal() and len(token_id) < 11):
            raise wrong(f"{token_id!r:.50} is not a token id")
        if not -100 <= bias <= 100:
            raise wrong(f"the bias of token {token_id} is not between -100 and 100")
    return value


def _schema_or_text(value: object) -> object:
    """Checks the union itself, because pydantic's error for a union would name no field."""
    if isinstance(value, str) and 1 <= len(value) <= MAX_GRAMMAR:
        return value
    if isinstance(value, dict) and len(value) <= MAX_KEYWORDS:
        return value
    raise wrong(f"it must be a JSON schema, as an object or as a text of at most {MAX_GRAMMAR} characters")


JsonSchemaOrText = Annotated[
    dict[str, Any] | str,
    PlainValidator(_schema_or_text),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "object", "maxProperties": MAX_KEYWORDS},
                {"type": "string", "minLength": 1, "maxLength": MAX_GRAMMAR},
            ]
        }
    ),
]
Regex = Annotated[str, Field(min_length=1, max_length=MAX_PATTERN)]
Choices = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_PATTERN)]], Field(min_length=1), AtMost(MAX_CONSTRAINED)
]
GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR)]
JSON = "JSON by this schema, which may be given as a text."
REGEX = "Text that this regular expression matches as a whole, in Rust's syntax: no look-around, no backreferences."
CHOICE = "One of these texts."
GRAMMAR = "Text that this grammar, in Lark or GBNF, allows."


class StreamOptions(Body):
    not_supported: ClassVar = unsupported.OF_STREAM_OPTIONS

    include_usage: bool | None = optional("Send the usage as a last event. Default: false.")
    continuous_usage_stats: bool | None = optional(
        "With include_usage: every event has the usage so far, not only the last event. Default: false."
    )


class StructuredOutputs(Body):
    """vLLM's field: the required form of the answer."""

    not_supported: ClassVar = unsupported.OF_STRUCTURED_OUTPUTS

    json_: JsonSchemaOrText | None = Field(default=None, alias="json", description=JSON)
    regex: Regex | None = optional(REGEX)
    choice: Choices | None = optional(CHOICE)
    grammar: GrammarText | None = optional(GRAMMAR)
    json_object: bool | None = optional("Any JSON object.")

    @property
    def only(self) -> tuple[str, Any]:
        """The requested kind and its value."""
        (asked,) = self._asked()
        return asked

    def _asked(self) -> list[tuple[str, Any]]:
        values: dict[str, Any] = {
            "json": self.json_,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
        }
        values["json_object"] = self.json_object or None
        return [(kind, value) for kind, value in values.items() if value is not None]

    @model_validator(mode="after")
    def _has_one(self) -> "StructuredOutputs":
        if len(self._asked()) != 1:
            raise wrong("it must have exactly one of json, regex, choice, grammar and json_object")
        return self


class ScaledAdapter(Body):
    """One adapter of a mix."""

    name: MixedName = required("An adapter's name, or NAME@HASH.")
    scale: AdapterScale | None = optional("Multiplies its own scale, alpha / r. Default: 1.")


class ModelFields(Body):
    """Fields of every request to the model."""

    model: str = required(MODEL)
    priority: Priority | None = optional(
        "Lower runs first; a level is worth 10 seconds of waiting. 0 to 100, or the key's bounds. Default: 0."
    )
    cache_salt: CacheSalt | None = optional(
        "Requests of a key share the prefix cache only if they have the same salt. Default: none."
    )
    adapter_scale: AdapterScale | None = optional(
        "Multiplies the adapter's own scale, alpha / r, or those of a mix. Default: 1."
    )
    adapter_id: AdapterId | None = optional(
        "LoRAX's field: an adapter; 'model' must then be the served model's name or the same adapter. Default: none."
    )
    adapters: Annotated[list[ScaledAdapter], Field(min_length=1), AtMost(MAX_MIXED_ADAPTERS)] | None = optional(
        "Adapters whose changes to the weights add up, each with its scale, in the place of 'model', which must then be"
        " the served model's name or the same adapters, joined by +. Default: those of 'model'."
    )
    adapter_source: AdapterSource = optional("LoRAX's field: the server's own adapters are the only source.")
    user: str | None = optional(USER)


class CommonFields(ModelFields):
    """Fields common to chats, completions and responses. GenerationBody has those that /v1/responses does not have."""

    temperature: OfModel[Temperature] = of_model("Higher is more random; 0 takes the likeliest token.", 1)
    top_p: OfModel[TopP] = of_model("Keep the likeliest tokens that together reach this probability.", 1)
    top_k: OfModel[TopK] = of_model("Keep this many of the likeliest tokens; 0 and -1 keep all.", "all")
    min_p: OfModel[MinP] = of_model("Keep tokens with at least this fraction of the likeliest token's probability.", 0)
    seed: Seed | None = optional(
        "The same seed draws the same random numbers, independently of other requests. Default: random."
    )
    stop: StopStrings = optional("Up to 32 texts that end the answer.")
    stream: bool | None = optional("Send the answer as server-sent events while it is generated. Default: false.")
    metadata: Metadata = optional(UNUSED)
    store: bool | None = optional("false: the server does not keep the answer for --feedback, so it cannot be rated.")
    service_tier: ServiceTier | None = optional(UNUSED)
    safety_identifier: SafetyIdentifier | None = optional(UNUSED)
    prompt_cache_key: str | None = optional(UNUSED)


class GenerationBody(CommonFields):
    """Fields common to chats and completions."""

    max_tokens: MaxTokens | None = None
    presence_penalty: Penalty | None = optional(
        "Subtracted from the logits of tokens that the answer already contains. Default: 0."
    )
    frequency_penalty: Penalty | None = optional(
        "Subtracted from a token's logit for each occurrence in the answer. Default: 0."
    )
    repetition_penalty: OfModel[Annotated[float, Field(ge=0.01, le=100)]] = of_model(
        "Divides the logits of tokens in prompt and answer.", 1
    )
    logit_bias: Annotated[dict[str, float], AfterValidator(_biases), AtMost(MAX_BIASED_TOKENS)] | None = optional(
        "A map from token ids to numbers from -100 to 100 that are added to their logits; at most 1024 entries, and"
        " 16384 over all answers to a request."
    )
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = optional("Answers to each prompt. Default: 1.")
    stop_token_ids: Annotated[list[TokenId], AtMost(MAX_STOP_TOKENS)] | None = optional("Tokens that end the answer.")
    min_tokens: Annotated[int, Field(ge=0, lt=2**63)] | None = optional("Minimum tokens of the answer. Default: 0.")
    include_stop_str_in_output: bool | None = optional("Keep the stop string or token in the text. Default: false.")
    ignore_eos: bool | None = optional("Do not end at the model's end-of-sequence tokens. Default: false.")
    skip_special_tokens: bool | None = optional("Omit special tokens from the text. Default: true.")
    add_special_tokens: bool | None = optional(
        "Add the tokenizer's special tokens, such as a first token. Default: true."
    )
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = optional(
        "Add the log-probability and rank of each token of the prompt, with so many of the likeliest tokens; not with"
        " stream. Default: none."
    )
    speculative: bool | None = optional(
        "Whether guesses of several tokens may be verified in one step, if the server does so (--speculative). The"
        " answer is the same. Default: true."
    )
    return_token_ids: bool | None = optional("Add token_ids, and prompt_token_ids, to the answer. Default: false.")
    receipt: bool | None = optional(
        "Add what `stellarbyte replay` needs to compute the answer again; not with stream. Default: false."
    )
    context_overflow: Literal["error", "slide"] | None = optional(
        "At the context's end: refuse (error), or evict the oldest tokens (slide). Default: as the"
        " server's --context-overflow."
    )
    stream_options: StreamOptions | None = optional("How to stream; only with stream.")
    structured_outputs: StructuredOutputs | None = optional("The required form of the answer. Default: any text.")
    guided_json: JsonSchemaOrText | None = optional(f"An older name of structured_outputs.json: {JSON}")
    guided_regex: Regex | None = optional(f"An older name of structured_outputs.regex: {REGEX}")
    guided_choice: Choices | None = optional(f"An older name of structured_outputs.choice: {CHOICE}")
    guided_grammar: GrammarText | None = optional(f"An older name of structured_outputs.grammar: {GRAMMAR}")

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every event of a stream has the usage so far."""
        options = self.stream_options
        return options is not None and self.include_usage and bool(options.continuous_usage_stats)

    @property
    def num_choices(self) -> int:
        """Answers returned for each prompt."""
        return 1 if self.n is None else self.n

    @property
    def num_candidates(self) -> int:
        """Answers generated for each prompt."""
        return self.num_choices
