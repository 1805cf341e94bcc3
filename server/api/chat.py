"""POST /v1/chat/completions."""

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.errors import bad_request
from server.api.generation import (
    AnswerForm,
    answer,
    check_prompt,
    context_limit,
    make_request,
    overflow_of,
    read_body,
    tokenize,
)
from server.api.schemas import ChatBody, Message
from server.api.service import ServiceOfRequest
from server.tokenizer import ChatTemplateError

router = APIRouter()

DEFAULT_SLIDING_MAX_TOKENS = 4096
_FORM = AnswerForm(
    id_prefix="chatcmpl-",
    object="chat.completion",
    chunk_object="chat.completion.chunk",
    choice=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    is_chat=True,
)


@router.post("/v1/chat/completions")
async def create_chat_completion(http: Request, service: ServiceOfRequest) -> Response:
    body, headers = await read_body(http, service, ChatBody)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise bad_request("'max_tokens' and 'max_completion_tokens' differ; give one of them.", "max_tokens")
    num_characters = sum(len(message.content) for message in body.messages if message.content is not None)
    encode = partial(service.tokenizer.encode_chat, [_for_template(message) for message in body.messages])
    try:
        token_ids = await tokenize(encode, num_characters)
    except ChatTemplateError as error:
        raise bad_request(str(error), "messages") from None
    room = check_prompt(token_ids, context_limit(body, service), "messages")
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if wanted is None:  # to the end of the context, if it has one
        wanted = DEFAULT_SLIDING_MAX_TOKENS if overflow_of(body, service) == "slide" else room
    max_tokens = min(wanted, room)
    return await answer(http, service, body, make_request(body, service, token_ids, max_tokens), _FORM, headers)


def _for_template(message: Message) -> dict[str, Any]:
    """A message as chat templates know it; they call the developer's role system."""
    content = "" if message.content is None else message.content
    known = {"role": "system" if message.role == "developer" else message.role, "content": content}
    return known if message.name is None else known | {"name": message.name}
