"""POST /v1/completions."""

from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.errors import bad_request
from server.api.generation import AnswerForm, answer, check_prompt, context_limit, make_request, read_body, tokenize
from server.api.schemas import CompletionBody
from server.api.service import ServiceOfRequest

router = APIRouter()

DEFAULT_MAX_TOKENS = 16
_FORM = AnswerForm(
    id_prefix="cmpl-",
    object="text_completion",
    chunk_object="text_completion",
    choice=lambda text: {"text": text},
    is_chat=False,
)


@router.post("/v1/completions")
async def create_completion(http: Request, service: ServiceOfRequest) -> Response:
    body, headers = await read_body(http, service, CompletionBody)
    if isinstance(body.prompt, str):
        token_ids = await tokenize(partial(service.tokenizer.encode, body.prompt), len(body.prompt))
    else:
        token_ids = body.prompt
        for token_id in (min(token_ids), max(token_ids)):
            if not 0 <= token_id < service.info.vocab_size:
                raise bad_request(
                    f"The token id {token_id} is not in the vocabulary of {service.info.vocab_size}.", "prompt"
                )
    limit = context_limit(body, service)
    room = check_prompt(token_ids, limit, "prompt")
    if body.max_tokens is not None and body.max_tokens > room:
        raise bad_request(
            f"The prompt's {len(token_ids)} tokens and max_tokens of {body.max_tokens} are more than the model's"
            f" context of {limit} tokens.",
            "max_tokens",
            "context_length_exceeded",
        )
    max_tokens = min(DEFAULT_MAX_TOKENS, room) if body.max_tokens is None else body.max_tokens
    return await answer(http, service, body, make_request(body, service, token_ids, max_tokens), _FORM, headers)
