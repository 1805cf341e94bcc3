"""Turns checked bodies into requests to the engine, for completions, chats, responses and embeddings."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar
from urllib.parse import quote

import msgspec
from fastapi import Request

from stellarbyte_server.api.answers.choices import PromptEcho
from stellarbyte_server.api.caller import most_tokens, overflow_for, owner_of, require_permitted
from stellarbyte_server.api.contract.bodies.body import BodyT, parse_body
from stellarbyte_server.api.contract.bodies.generation import MAX_CHOICES, GenerationBody, ModelFields
from stellarbyte_server.api.contract.errors import ApiError, bad_request
from stellarbyte_server.api.disconnect import unless_client_leaves
from stellarbyte_server.api.sampling import sampling_params
from stellarbyte_server.api.service import Service
from stellarbyte_server.protocol.adapter_reference import (
    MAX_MIXED_ADAPTERS,
    AdapterMix,
    AdapterReference,
    mix_of,
    parse_references,
)
from stellarbyte_server.protocol.request import (
    MAX_SLIDING_TOKENS,
    QUEUE_FULL,
    Channels,
    GenerationRequest,
    Reasoning,
)
from stellarbyte_server.tokens.text_work import SHORT_CHARACTERS, TooMuchText

_INLINE_CHARACTERS = 2000  # longer inputs are tokenized in a thread, so that they do not delay streams
_INLINE_BYTES = 16_384  # larger bodies are parsed in a thread
_IGNORED, _MAX_IGNORED_HEADER = "X-Ignored-Fields", 1000
T = TypeVar("T")
B = TypeVar("B", bound=GenerationBody)
MAX_TOKENS_AT_ONCE = 2**20  # of all prompts, or of all answers, of one request that has several
# Each answer has its own copy of these, prepared in its first step.
MAX_BIASES_AT_ONCE = 2**14  # entries of logit_bias, of all answers
MAX_GRAMMARS_AT_ONCE = 2**20  # characters of the grammars of all answers


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt of a request, ready to run."""

    token_ids: list[int]
    max_tokens: int
    echo: PromptEcho | None = None


async def read_body(request: Request, service: Service, body_class: type[BodyT]) -> tuple[BodyT, dict[str, str]]:
    """Read and check a body and its key's permissions; returns the body, and headers that list ignored fields."""
    warn_unknown = service.settings.unknown_fields == "warn"
    body, ignored = await parse_apart(request, service, partial(parse_body, body_class, warn_unknown=warn_unknown))
    body = with_adapter_as_model(body, service.settings.model_name)
    require_permitted(request, service, body)
    return body, with_ignored({}, ignored)


def with_adapter_as_model(body: BodyT, base: str) -> BodyT:
    """The body with the adapters of `adapter_id` or `adapters`, if given, as its `model`; ApiError if it has others."""
    if not isinstance(body, ModelFields) or (body.adapter_id is None and body.adapters is None):
        return body
    field, named = "adapter_id", body.adapter_id
    if body.adapters is not None:
        field, named = "adapters", "+".join(adapter.name for adapter in body.adapters)
        if body.adapter_id is not None:
            raise bad_request("Give either the field 'adapter_id' or the field 'adapters'.", field)
    if body.model not in (base, named):
        raise bad_request(
            f"The fields {field!r} and 'model' name two adapters; give one of them, or {base!r:.200} as 'model'.", field
        )
    return body.model_copy(update={"model": named})


def with_ignored(headers: dict[str, str], paths: Sequence[str]) -> dict[str, str]:
    """The headers, with these fields added to the list of ignored ones."""
    if not paths:
        return headers
    named = [headers[_IGNORED]] if _IGNORED in headers else []
    named += [quote(path, safe="[]._-") for path in paths]
    return headers | {_IGNORED: ", ".join(named)[:_MAX_IGNORED_HEADER]}


async def parse_apart(request: Request, service: Service, parse: Callable[[bytes], T]) -> T:
    """Parse the body of a request; a large one off the event loop, in the caller's turn."""
    _require_json(request)
    text = await request.body()
    if len(text) <= _INLINE_BYTES:
        return parse(text)
    try:
        return await service.text_work.parse(partial(parse, text), owner_of(request), len(text))
    except TooMuchText as error:
        raise _too_much(error) from None


def _require_json(request: Request) -> None:
    """ApiError 415 if the Content-Type is not JSON; a missing header is accepted."""
    given = request.headers.get("content-type")
    kind = "" if given is None else given.partition(";")[0].strip().lower()
    if given is not None and not (kind in ("application/json", "text/json") or kind.endswith("+json")):
        raise ApiError(415, f"The header 'Content-Type' must be application/json, not {kind[:80]!r}.")


async def off_loop_if_long(http: Request, service: Service, work: Callable[[], T], num_characters: int) -> T:
    """Do work on texts, `off_loop` if they are long in total."""
    return work() if num_characters <= _INLINE_CHARACTERS else await off_loop(http, service, work, num_characters)


async def off_loop(http: Request, service: Service, work: Callable[[], T], num_characters: int) -> T:
    """Do work on a text in a thread, in the caller's turn. The tokenizer releases the GIL.

    ApiError 429 if too much of the caller's work is waiting, ClientLeft if the client disconnects during a long text.
    """
    working = service.text_work.run(work, owner_of(http), num_characters)
    try:
        return await (working if num_characters <= SHORT_CHARACTERS else unless_client_leaves(http.receive, working))
    except TooMuchText as error:
        raise _too_much(error) from None


def _too_much(error: TooMuchText) -> ApiError:
    return ApiError(429, str(error), code=QUEUE_FULL, headers={"Retry-After": "1"})


def adapter_of(body: ModelFields, service: Service) -> tuple[AdapterReference | AdapterMix | None, float]:
    """The adapter, or the mix of several, that a body names, and its scale; ApiError if there can be none such."""
    scale = 1.0 if body.adapter_scale is None else float(body.adapter_scale)
    if body.adapters is None and body.model == service.settings.model_name:
        if scale != 1:
            raise bad_request("The field 'adapter_scale' needs an adapter in 'model'.", "adapter_scale")
        return None, scale
    references = parse_references(body.model)
    field = "model" if body.adapters is None else "adapters"
    if len(references) > MAX_MIXED_ADAPTERS:
        message = f"The field {field!r} mixes {len(references)} adapters; at most {MAX_MIXED_ADAPTERS} are allowed."
        raise bad_request(message, field)
    names = [reference.name for reference in references]
    for name in names:
        if names.count(name) > 1:
            raise bad_request(f"The field {field!r} names the adapter {name!r:.200} twice.", field)
    given = [None] * len(names) if body.adapters is None else [adapter.scale for adapter in body.adapters]
    scales = [1.0 if each is None else float(each) for each in given]
    if len(references) == 1:
        return references[0], scale * scales[0]
    return mix_of(tuple(zip(references, scales, strict=True))), scale


def user_of(body: ModelFields) -> str:
    """The end user that a body names; "": none."""
    named = (getattr(body, field, None) for field in ("user", "safety_identifier"))
    return next((user for user in named if user), "")


def check_characters(num_characters: int, limit: int, service: Service, param: str) -> None:
    """ApiError if a text is too long for the context with any tokenization; checked before tokenizing."""
    if num_characters > limit * service.tokenizer.longest_token:
        raise bad_request(
            f"The prompt has {num_characters} characters, which cannot fit the model's context of {limit} tokens.",
            param,
            "context_length_exceeded",
        )


def check_token_ids(token_ids: Sequence[int], service: Service, param: str) -> None:
    """ApiError if a token id is not in the vocabulary."""
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < service.info.vocab_size:
            raise bad_request(f"Token ids must be from 0 to {service.info.vocab_size - 1}; {token_id} is not.", param)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits of a request's length."""

    overflow: Literal["error", "slide"]  # behaviour at the end of the context
    context: int  # maximum tokens of prompt and answer together
    answer: int | None  # maximum tokens of one answer; None: the rest of the context

    @classmethod
    def of(cls, http: Request, body: GenerationBody, service: Service) -> "Bounds":
        """The limits by request, caller's key and server; ApiError if the request exceeds them."""
        overflow = overflow_for(http, service, body.context_overflow)
        most = most_tokens(http, service)
        for param in ("max_tokens", "max_completion_tokens"):
            wanted = getattr(body, param, None)
            if most is not None and wanted is not None and wanted > most:
                raise bad_request(
                    f"An answer may have at most {most} tokens here, but the request allows {wanted}.", param
                )
        context = MAX_SLIDING_TOKENS if overflow == "slide" else service.info.max_model_len
        return cls(overflow=overflow, context=context, answer=most)

    def default_tokens(self, wanted: int) -> int:
        """Tokens of an answer without an explicit limit."""
        return wanted if self.answer is None else min(wanted, self.answer)


def check_prompt(token_ids: list[int], limit: int, param: str, *, least: int = 1) -> int:
    """Tokens that `limit` leaves for the answer, at least `least`; ApiError if the prompt is empty or too long."""
    if not token_ids:
        raise bad_request("The prompt is empty; give at least one token.", param)
    room = limit - len(token_ids)
    if room < least:
        raise bad_request(
            f"The prompt has {len(token_ids)} tokens, but the model's context of {limit} tokens must hold it"
            f"{' and at least one token of the answer' if least else ''}.",
            param,
            "context_length_exceeded",
        )
    return room


def most_at_once(service: Service) -> int:
    """Requests of one client that the engine's queue can hold if it is empty."""
    return min(MAX_CHOICES, service.info.max_num_seqs + service.settings.engine.max_queued_requests)


def check_body(body: GenerationBody, num_prompts: int, service: Service) -> None:
    """ApiError if fields contradict each other."""
    if body.stream_options is not None and not body.stream:
        raise bad_request("The field 'stream_options' is only allowed when 'stream' is true.", "stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise bad_request("The field 'prompt_logprobs' is not allowed when 'stream' is true.", "prompt_logprobs")
    if body.receipt and body.stream:
        raise bad_request("The field 'receipt' is not allowed when 'stream' is true.", "receipt")
    wanted, most = num_prompts * body.num_candidates, most_at_once(service)
    if wanted > most:
        raise bad_request(
            f"The request asks for {wanted} answers; at most {most} are allowed.", "prompt" if num_prompts > 1 else "n"
        )


def with_seed(body: B) -> B:
    """A body that asks for a receipt with the seed of its answers, if the client gave none."""
    if not body.receipt or body.seed is not None:
        return body
    return body.model_copy(update={"seed": secrets.randbits(63)})


def make_requests(
    body: GenerationBody,
    service: Service,
    prompts: list[Prompt],
    bounds: Bounds,
    *,
    logprobs: int | None = None,
    echoed_logprobs: int | None = None,
    grammar: str | None = None,
    reasoning: Reasoning | Channels | None = None,
    prediction_token_ids: tuple[int, ...] = (),
) -> tuple[GenerationRequest, ...]:
    """One request for each prompt and answer, in order; ApiError.

    `logprobs` and `echoed_logprobs` are the alternatives beside each token of the answer and of an echoed prompt.
    """
    of_prompt = [number for number in (echoed_logprobs, body.prompt_logprobs) if number is not None]
    prompt_logprobs = max(of_prompt, default=None)
    _check_amounts(body, prompts, logprobs, prompt_logprobs, grammar)
    adapter, adapter_scale = adapter_of(body, service)
    bias = {} if body.logit_bias is None else {int(token): value for token, value in body.logit_bias.items()}
    check_token_ids(list(bias), service, "logit_bias")
    stop_token_ids = () if body.stop_token_ids is None else tuple(body.stop_token_ids)
    check_token_ids(stop_token_ids, service, "stop_token_ids")
    requests: list[GenerationRequest] = []
    for prompt in prompts:
        if body.min_tokens is not None and body.min_tokens > prompt.max_tokens:
            raise bad_request(
                f"The field 'min_tokens' must be at most the {prompt.max_tokens} tokens of the answer.", "min_tokens"
            )
        sampling = sampling_params(
            body,
            service.sampling_defaults,
            max_tokens=prompt.max_tokens,
            seed=secrets.randbits(63) if body.seed is None else body.seed % 2**64,
            logit_bias=tuple(bias.items()),
            stop_token_ids=stop_token_ids,
            include_stop=bool(body.include_stop_str_in_output),
            grammar=grammar,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            return_token_ids=bool(body.return_token_ids or body.receipt),
        )
        prompt_token_ids = tuple(prompt.token_ids)
        first_id = secrets.token_hex(12)
        for choice in range(body.num_candidates):
            is_follower = choice > 0 and prompt_logprobs is None
            requests.append(
                GenerationRequest(
                    request_id=secrets.token_hex(12) if choice else first_id,
                    prompt_token_ids=prompt_token_ids,
                    sampling=msgspec.structs.replace(sampling, choice=choice),
                    priority=0 if body.priority is None else body.priority,
                    context_overflow=bounds.overflow,
                    adapter=adapter,
                    adapter_scale=adapter_scale,
                    cache_salt="" if body.cache_salt is None else body.cache_salt,
                    caller=user_of(body),
                    follows=first_id if is_follower else None,
                    reasoning=reasoning,
                    speculative=body.speculative is not False,
                    prediction_token_ids=prediction_token_ids,
                )
            )
    return tuple(requests)


def _check_amounts(
    body: GenerationBody, prompts: list[Prompt], logprobs: int | None, prompt_logprobs: int | None, grammar: str | None
) -> None:
    """ApiError if several answers together need too much memory."""
    num_candidates = body.num_candidates
    num_answer_tokens = num_candidates * sum(prompt.max_tokens for prompt in prompts)
    if logprobs is not None and not body.stream and num_answer_tokens * (1 + logprobs) > MAX_TOKENS_AT_ONCE:
        raise bad_request(
            f"The answer may have {num_answer_tokens * (1 + logprobs)} log-probabilities; at most {MAX_TOKENS_AT_ONCE}"
            " are allowed when 'stream' is not true.",
            "max_tokens",
        )
    num_prompt_tokens = num_candidates * sum(len(prompt.token_ids) for prompt in prompts)
    if prompt_logprobs is not None and num_prompt_tokens * (1 + prompt_logprobs) > MAX_TOKENS_AT_ONCE:
        raise bad_request(
            f"The prompts of all answers together have {num_prompt_tokens * (1 + prompt_logprobs)} log-probabilities;"
            f" at most {MAX_TOKENS_AT_ONCE} are allowed.",
            "logprobs" if body.prompt_logprobs is None else "prompt_logprobs",
        )
    if num_candidates * len(prompts) == 1:
        return
    if num_answer_tokens > MAX_TOKENS_AT_ONCE:
        raise bad_request(
            f"All answers together may have {num_answer_tokens} tokens; at most {MAX_TOKENS_AT_ONCE} are allowed.",
            "max_tokens",
        )
    several = "n" if num_candidates > 1 else "prompt"
    for what, number, most in (
        ("entries of logit_bias", len(body.logit_bias or ()), MAX_BIASES_AT_ONCE),
        ("characters of schemas", len(grammar or ""), MAX_GRAMMARS_AT_ONCE),
    ):
        number *= num_candidates * len(prompts)
        if number > most:
            raise bad_request(f"All answers together have {number} {what}; at most {most} are allowed.", several)
    if num_prompt_tokens > MAX_TOKENS_AT_ONCE:
        raise bad_request(
            f"The prompts of all answers together have {num_prompt_tokens} tokens; at most {MAX_TOKENS_AT_ONCE} are"
            " allowed.",
            several,
        )
