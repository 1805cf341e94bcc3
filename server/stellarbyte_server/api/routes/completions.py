"""POST /v1/completions."""

from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.answers.answer import AnswerPlan, answer
from stellarbyte_server.api.answers.choices import ChoiceForm, ChoiceReader, PromptEcho
from stellarbyte_server.api.answers.ends import KeptRequest
from stellarbyte_server.api.contract import objects
from stellarbyte_server.api.contract.bodies.completion import CompletionBody
from stellarbyte_server.api.contract.bodies.prompt_input import PromptInput
from stellarbyte_server.api.contract.errors import bad_request
from stellarbyte_server.api.contract.operation import GENERATION_REFUSED, Operation
from stellarbyte_server.api.generation import (
    Bounds,
    Prompt,
    check_body,
    check_characters,
    check_prompt,
    check_token_ids,
    make_requests,
    off_loop_if_long,
    read_body,
    with_seed,
)
from stellarbyte_server.api.service import Service, ServiceOfRequest
from stellarbyte_server.api.structure import requested_structure, text_grammar
from stellarbyte_server.tokens.tokenizer import UnembeddableTokenError

router = APIRouter()

DEFAULT_MAX_TOKENS = 16


@router.post("/v1/completions")
@Operation(
    access=Access.USER,
    summary="Continue a prompt",
    tag="Generation",
    bodies=(CompletionBody,),
    answer=objects.Completion,
    event=objects.CompletionChunk,
    errors=GENERATION_REFUSED,
)
async def create_completion(http: Request, service: ServiceOfRequest) -> Response:
    body, headers = await read_body(http, service, CompletionBody)
    return await answer(http, service, await plan_completion(http, with_seed(body), service), headers)


async def plan_completion(http: Request, body: CompletionBody, service: Service) -> AnswerPlan:
    """The engine's requests for a body, and the form of the answer; ApiError."""
    check_body(body, len(body.prompt), service)
    if body.num_candidates < body.num_choices:
        raise bad_request("The field 'best_of' is less than 'n'.", "best_of")
    if body.num_candidates > body.num_choices and body.stream:
        raise bad_request("The field 'best_of' cannot be more than 'n' when 'stream' is true.", "best_of")
    if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
        raise bad_request("The field 'max_tokens' is 0, which needs 'echo' or 'prompt_logprobs'.", "max_tokens")
    grammar = await text_grammar(http, service, requested_structure(body))
    bounds = Bounds.of(http, body, service)
    num_characters = sum(map(len, body.prompt))
    prompts = [await _prompt(http, body, service, given, num_characters, bounds) for given in body.prompt]
    is_ranked = body.num_candidates > body.num_choices
    requests = make_requests(
        body,
        service,
        prompts,
        bounds,
        logprobs=0 if body.logprobs is None and is_ranked else body.logprobs,
        echoed_logprobs=body.logprobs if body.echo else None,
        grammar=grammar.text,
    )
    forms = [_form(body, prompt) for prompt in prompts]
    token_bytes = service.tokenizer.token_bytes
    return AnswerPlan(
        kind="completion",
        model=body.model,
        requests=requests,
        candidates=body.num_candidates,
        choices=body.num_choices,
        reader=lambda number: ChoiceReader(forms[number // body.num_candidates], token_bytes),
        stream=bool(body.stream),
        grammar_param=grammar.param,
        check=grammar.check,
        include_usage=body.include_usage,
        continuous_usage=body.continuous_usage,
        kept=KeptRequest.of(body, service),
        receipt_of=body if body.receipt else None,
    )


async def _prompt(
    http: Request, body: CompletionBody, service: Service, given: PromptInput, num_characters: int, bounds: Bounds
) -> Prompt:
    """A prompt as token ids, and the number of tokens it leaves for the answer; ApiError."""
    limit = bounds.context
    least = 0 if body.max_tokens == 0 else 1
    if isinstance(given, str):
        check_characters(len(given), limit, service, "prompt")
    else:
        check_prompt(given, limit, "prompt", least=least)
    encode = partial(_encode, body, service, given)
    try:
        token_ids, echo = await off_loop_if_long(http, service, encode, num_characters)
    except UnembeddableTokenError as error:
        raise bad_request(str(error), "prompt") from None
    room = check_prompt(token_ids, limit, "prompt", least=least)
    if body.max_tokens is not None and body.max_tokens > room:
        raise bad_request(
            f"The prompt's {len(token_ids)} tokens and max_tokens of {body.max_tokens} are more than the model's"
            f" context of {limit} tokens.",
            "max_tokens",
            "context_length_exceeded",
        )
    max_tokens = bounds.default_tokens(min(DEFAULT_MAX_TOKENS, room)) if body.max_tokens is None else body.max_tokens
    return Prompt(token_ids=token_ids, max_tokens=max_tokens, echo=echo)


def _encode(body: CompletionBody, service: Service, given: PromptInput) -> tuple[list[int], PromptEcho | None]:
    """A prompt's token ids, and its echo; ApiError."""
    tokenizer = service.tokenizer
    if isinstance(given, str):
        add_special_tokens = body.add_special_tokens is not False
        if not body.echo:
            return tokenizer.encode(given, add_special_tokens), None
        token_ids, offsets = tokenizer.encode_for_echo(given, add_special_tokens)
        return token_ids, PromptEcho(given, token_ids, offsets)
    check_token_ids(given, service, "prompt")
    if not body.echo:
        return given, None
    text, offsets = tokenizer.decode_with_offsets(given, body.skip_special_tokens is not False)
    return given, PromptEcho(text, given, offsets)


def _form(body: CompletionBody, prompt: Prompt) -> ChoiceForm:
    return ChoiceForm(
        kind="completion",
        logprobs=body.logprobs,
        echo=prompt.echo,
        prompt_logprobs=body.prompt_logprobs,
        prompt_token_ids=prompt.token_ids if body.return_token_ids else None,
    )
