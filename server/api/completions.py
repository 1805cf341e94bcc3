"""POST /v1/completions."""

import asyncio
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answer import AnswerPlan, answer
from server.api.choices import ChoiceForm, ChoiceReader, PromptEcho
from server.api.errors import bad_request
from server.api.generation import (
    Prompt,
    check_body,
    check_characters,
    check_prompt,
    check_token_ids,
    context_limit,
    make_requests,
    read_body,
    tokenize,
)
from server.api.schemas import CompletionBody
from server.api.schemas import Prompt as PromptInput
from server.api.service import Service, ServiceOfRequest

router = APIRouter()

DEFAULT_MAX_TOKENS = 16


@router.post("/v1/completions")
async def create_completion(http: Request, service: ServiceOfRequest) -> Response:
    body, headers = await read_body(http, service, CompletionBody)
    check_body(body, len(body.prompt), service)
    if body.num_candidates < body.num_choices:
        raise bad_request("The field 'best_of' is less than 'n'.", "best_of")
    if body.num_candidates > body.num_choices and body.stream:
        raise bad_request("The field 'best_of' cannot be more than 'n' when 'stream' is true.", "best_of")
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("The field 'max_tokens' is 0, which needs 'echo'.", "max_tokens")
    prompts = await asyncio.gather(*(_prompt(body, service, prompt) for prompt in body.prompt))
    is_ranked = body.num_candidates > body.num_choices
    requests = make_requests(
        body,
        service,
        prompts,
        logprobs=0 if body.logprobs is None and is_ranked else body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    forms = [_form(body, prompt) for prompt in prompts]
    token_bytes = service.tokenizer.token_bytes
    plan = AnswerPlan(
        kind="completion",
        model=body.model,
        requests=requests,
        candidates=body.num_candidates,
        choices=body.num_choices,
        reader=lambda number: ChoiceReader(forms[number // body.num_candidates], token_bytes),
        stream=bool(body.stream),
        include_usage=body.include_usage,
    )
    return await answer(http, service, plan, headers)


async def _prompt(body: CompletionBody, service: Service, given: PromptInput) -> Prompt:
    """A prompt as token ids, and the room it leaves; ApiError."""
    limit = context_limit(body, service)
    if isinstance(given, str):
        check_characters(len(given), limit, service, "prompt")
        encode = partial(service.tokenizer.encode, given, add_special_tokens=body.add_special_tokens is not False)
        token_ids = await tokenize(encode, len(given))
    else:
        token_ids = given
        check_token_ids(token_ids, service, "prompt")
    room = check_prompt(token_ids, limit, "prompt", least=0 if body.max_tokens == 0 else 1)
    if body.max_tokens is not None and body.max_tokens > room:
        raise bad_request(
            f"The prompt's {len(token_ids)} tokens and max_tokens of {body.max_tokens} are more than the model's"
            f" context of {limit} tokens.",
            "max_tokens",
            "context_length_exceeded",
        )
    echo = None
    if body.echo:
        text = given if isinstance(given, str) else _decode(body, service, token_ids)
        echo = PromptEcho(text, token_ids)
    max_tokens = min(DEFAULT_MAX_TOKENS, room) if body.max_tokens is None else body.max_tokens
    return Prompt(token_ids=token_ids, max_tokens=max_tokens, echo=echo)


def _decode(body: CompletionBody, service: Service, token_ids: list[int]) -> str:
    return service.tokenizer.decode(token_ids, skip_special_tokens=body.skip_special_tokens is not False)


def _form(body: CompletionBody, prompt: Prompt) -> ChoiceForm:
    return ChoiceForm(
        kind="completion",
        logprobs=body.logprobs,
        echo=prompt.echo,
        prompt_token_ids=prompt.token_ids if body.return_token_ids else None,
        skip_special_tokens=body.skip_special_tokens is not False,
    )
