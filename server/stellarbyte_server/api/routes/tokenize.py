"""POST /tokenize and /detokenize, as in vLLM: token ids of a prompt or a chat, and text of tokens. Does not run the
model."""

from collections.abc import Callable
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.answers.sse import encode_json
from stellarbyte_server.api.chat.prompt import chat_encoder, check_continuation
from stellarbyte_server.api.chat.reasoning import template_variables
from stellarbyte_server.api.chat.tools import Toolbox
from stellarbyte_server.api.contract import objects
from stellarbyte_server.api.contract.bodies.tokenize import (
    DetokenizeBody,
    TokenizeBody,
    TokenizeChatBody,
    TokenizePromptBody,
)
from stellarbyte_server.api.contract.errors import bad_request, from_engine
from stellarbyte_server.api.contract.operation import BODY_REFUSED, Operation
from stellarbyte_server.api.generation import check_token_ids, off_loop, read_body, with_ignored
from stellarbyte_server.api.key_rate import charge
from stellarbyte_server.api.routes.adapters import adapters_of
from stellarbyte_server.api.service import Service, ServiceOfRequest
from stellarbyte_server.api.submission import record_of
from stellarbyte_server.protocol.adapter_reference import parse_references
from stellarbyte_server.protocol.request import model_not_found
from stellarbyte_server.tokens.tokenizer import ChatTemplateError, UnembeddableTokenError

router = APIRouter()


@router.post("/tokenize")
@Operation(
    access=Access.USER,
    summary="Turn a prompt or a chat into tokens",
    tag="Tokens",
    bodies=(TokenizePromptBody, TokenizeChatBody),
    answer=objects.Tokenized,
    errors=(*BODY_REFUSED, 404),
)
async def tokenize(http: Request, service: ServiceOfRequest) -> Response:
    await charge(http, service)
    body, headers = await read_body(http, service, TokenizeBody)
    if isinstance(body, TokenizePromptBody):
        encode_text = partial(service.tokenizer.encode, body.prompt, body.add_special_tokens is not False)
        return await _answer(http, body, service, headers, encode_text)
    assert isinstance(body, TokenizeChatBody)
    check_continuation(body)
    toolbox = Toolbox.of(body.tools, None, None, service.tokenizer.chat_template_source)
    variables = template_variables(body.chat_template_kwargs, None, service, toolbox)
    encode = chat_encoder(body, service, toolbox, variables.values, may_end_open=True)
    return await _answer(http, body, service, with_ignored(headers, variables.ignored), encode)


@router.post("/detokenize")
@Operation(
    access=Access.USER,
    summary="Turn tokens into text",
    tag="Tokens",
    bodies=(DetokenizeBody,),
    answer=objects.Detokenized,
    errors=(*BODY_REFUSED, 404),
)
async def detokenize(http: Request, service: ServiceOfRequest) -> Response:
    await charge(http, service)
    body, headers = await read_body(http, service, DetokenizeBody)
    await require_served(body.model, service)

    def work() -> bytes:
        check_token_ids(body.tokens, service, "tokens")
        return encode_json({"prompt": service.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    return _json(await off_loop(http, service, work, record_of(http).body_bytes), headers)


async def _answer(
    http: Request,
    body: TokenizeBody,
    service: Service,
    headers: dict[str, str],
    encode: Callable[[], list[int]],
) -> Response:
    await require_served(body.model, service)

    def work() -> bytes:
        token_ids = encode()
        texts = [service.tokenizer.token_text(token_id) for token_id in token_ids] if body.return_token_strs else None
        return encode_json(
            {
                "count": len(token_ids),
                "max_model_len": service.info.max_model_len,
                "tokens": token_ids,
                "token_strs": texts,
            }
        )

    try:
        return _json(await off_loop(http, service, work, record_of(http).body_bytes), headers)
    except ChatTemplateError as error:
        raise bad_request(str(error), "messages") from None
    except UnembeddableTokenError as error:
        raise bad_request(str(error), "prompt" if isinstance(body, TokenizePromptBody) else "messages") from None


def _json(content: bytes, headers: dict[str, str]) -> Response:
    return Response(content, media_type="application/json", headers=headers)


async def require_served(model: str | None, service: Service) -> None:
    """ApiError unless `model` is the served model, one of its adapters, a mix of them, or absent.

    They all share one tokenizer.
    """
    if model is None or model == service.settings.model_name:
        return
    cards = [card for card in (await adapters_of(service)).cards if card.is_current and card.state != "failed"]
    for reference in parse_references(model):
        if not any(card.name == reference.name and reference.selects(card.content_hash) for card in cards):
            raise from_engine(model_not_found(str(reference)))
