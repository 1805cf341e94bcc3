"""POST /v1/chat/completions."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.answers.answer import answer
from stellarbyte_server.api.chat.plan import plan_chat
from stellarbyte_server.api.contract import objects
from stellarbyte_server.api.contract.bodies.chat import ChatBody
from stellarbyte_server.api.contract.operation import GENERATION_REFUSED, Operation
from stellarbyte_server.api.generation import read_body, with_ignored, with_seed
from stellarbyte_server.api.service import ServiceOfRequest

router = APIRouter()


@router.post("/v1/chat/completions")
@Operation(
    access=Access.USER,
    summary="Answer a chat",
    tag="Generation",
    bodies=(ChatBody,),
    answer=objects.ChatCompletion,
    event=objects.ChatCompletionChunk,
    errors=GENERATION_REFUSED,
)
async def create_chat_completion(http: Request, service: ServiceOfRequest) -> Response:
    body, headers = await read_body(http, service, ChatBody)
    body = with_seed(body)
    plan = await plan_chat(http, body, service)
    return await answer(http, service, plan, with_ignored(headers, plan.ignored))
