"""POST /tokenize and /detokenize, as vLLM has them: what a prompt or a chat is in tokens, and back. Runs no model."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from server.api.adapters import adapters_of
from server.api.chat_prompt import chat_encoder, check_continuation
from server.api.errors import bad_request, from_engine
from server.api.generation import check_token_ids, read_body
from server.api.schemas import Body, Messages, TokenId, parse_plain_body
from server.api.service import Service, ServiceOfRequest
from server.api.sse import encode_json
from server.api.tools import MAX_TOOLS, FunctionTool, Toolbox
from server.engine.request import model_not_found
from server.tokenizer import ChatTemplateError

router = APIRouter()

MAX_TOKENS = 2**20
MAX_CHARACTERS = 2**22


class _Kind(BaseModel):
    """Which of the two bodies of /tokenize one is."""

    prompt: Any = None
    messages: Any = None


class TokenizePromptBody(Body):
    model: str | None = None
    prompt: Annotated[str, Field(max_length=MAX_CHARACTERS)]
    messages: None = None
    add_special_tokens: bool | None = None  # true
    return_token_strs: bool | None = None


class TokenizeChatBody(Body):
    model: str | None = None
    prompt: None = None
    messages: Messages
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    add_generation_prompt: bool | None = None  # true, unless the final message is continued
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None  # false: the template writes them
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS)]


@router.post("/tokenize")
async def tokenize(http: Request, service: ServiceOfRequest) -> Response:
    kind = parse_plain_body(_Kind, await http.body())
    if kind.prompt is not None and kind.messages is not None:
        raise bad_request("Give 'prompt' or 'messages', not both.", "messages")
    if kind.messages is None:
        prompt, headers = await read_body(http, service, TokenizePromptBody)
        return await _answer(prompt, service, headers, _prompt_encoder(prompt, service))
    chat, headers = await read_body(http, service, TokenizeChatBody)
    return await _answer(chat, service, headers, _chat_encoder(chat, service))


@router.post("/detokenize")
async def detokenize(http: Request, service: ServiceOfRequest) -> Response:
    body, headers = await read_body(http, service, DetokenizeBody)
    check_token_ids(body.tokens, service, "tokens")
    await _require_model(body.model, service)

    def work() -> bytes:
        return encode_json({"prompt": service.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    return _json(await asyncio.to_thread(work), headers)


async def _answer(
    body: TokenizePromptBody | TokenizeChatBody,
    service: Service,
    headers: dict[str, str],
    encode: Callable[[], list[int]],
) -> Response:
    await _require_model(body.model, service)

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
        return _json(await asyncio.to_thread(work), headers)
    except ChatTemplateError as error:
        raise bad_request(str(error), "messages") from None


def _prompt_encoder(body: TokenizePromptBody, service: Service) -> Callable[[], list[int]]:
    return partial(service.tokenizer.encode, body.prompt, body.add_special_tokens is not False)


def _chat_encoder(body: TokenizeChatBody, service: Service) -> Callable[[], list[int]]:
    check_continuation(body)
    toolbox = Toolbox.of(body.tools, None, None, service.tokenizer.chat_template_source)
    return chat_encoder(body, service, toolbox)


def _json(content: bytes, headers: dict[str, str]) -> Response:
    return Response(content, media_type="application/json", headers=headers)


async def _require_model(model: str | None, service: Service) -> None:
    """ApiError unless `model` is the served model, one of its adapters (NAME or NAME@HASH), or left out.

    All of them share one tokenizer.
    """
    if model is None or model == service.settings.model_name:
        return
    name, at, pin = model.partition("@")
    for card in (await adapters_of(service)).cards:
        is_served = card.is_current and card.state != "failed" and card.name == name
        if is_served and (not at or (pin and (card.content_hash or pin).startswith(pin))):
            return
    raise from_engine(model_not_found(model))
