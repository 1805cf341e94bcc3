"""POST /v1/completions/render and /v1/chat/completions/render: the prompts of a request, without generating.

Bodies are read, checked and refused by the code of the endpoints that generate.
"""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.answers.answer import AnswerPlan
from stellarbyte_server.api.answers.sse import encode_json
from stellarbyte_server.api.chat.origins import Stretch, stretches_of_chat, with_tokens
from stellarbyte_server.api.chat.plan import plan_rendered_chat
from stellarbyte_server.api.contract.bodies.chat import ChatBody
from stellarbyte_server.api.contract.bodies.completion import CompletionBody
from stellarbyte_server.api.contract.errors import from_engine
from stellarbyte_server.api.contract.operation import GENERATION_REFUSED, Operation
from stellarbyte_server.api.contract.render_objects import RenderedPrompt, RenderedPrompts
from stellarbyte_server.api.generation import off_loop, read_body, with_ignored
from stellarbyte_server.api.key_rate import charge
from stellarbyte_server.api.routes.completions import plan_completion
from stellarbyte_server.api.routes.tokenize import require_served
from stellarbyte_server.api.service import Service, ServiceOfRequest
from stellarbyte_server.api.submission import record_of
from stellarbyte_server.client.engine_client import DRAINING
from stellarbyte_server.protocol.request import SHUTTING_DOWN, RequestRejected

router = APIRouter()


@router.post("/v1/completions/render")
@Operation(
    access=Access.USER,
    summary="The prompts of a completion as tokens",
    tag="Tokens",
    bodies=(CompletionBody,),
    answer=RenderedPrompts,
    errors=GENERATION_REFUSED,
)
async def render_completion(http: Request, service: ServiceOfRequest) -> Response:
    await charge(http, service)
    body, headers = await read_body(http, service, CompletionBody)
    plan = await plan_completion(http, body, service)
    await _require_accepted(body.model, service)

    def work() -> bytes:
        rendered = []
        for number, given in enumerate(body.prompt):
            if isinstance(given, str):
                text, starts = given, service.tokenizer.starts(given, body.add_special_tokens is not False)
            else:
                text = service.tokenizer.decode(given, skip_special_tokens=False)
                starts = [0] * len(given)
            rendered.append(_rendered(plan, number, service, text, with_tokens([Stretch("prompt", text)], starts)))
        return encode_json(rendered)

    return _json(await off_loop(http, service, work, record_of(http).body_bytes), headers)


@router.post("/v1/chat/completions/render")
@Operation(
    access=Access.USER,
    summary="The prompt of a chat as tokens",
    tag="Tokens",
    bodies=(ChatBody,),
    answer=RenderedPrompt,
    errors=GENERATION_REFUSED,
)
async def render_chat(http: Request, service: ServiceOfRequest) -> Response:
    await charge(http, service)
    body, headers = await read_body(http, service, ChatBody)
    plan, render = await plan_rendered_chat(http, body, service)
    await _require_accepted(body.model, service)
    roles = [message.role for message in body.messages]

    def work() -> bytes:
        text = render(body)
        starts = service.tokenizer.starts(text, bool(body.add_special_tokens))
        stretches = with_tokens(stretches_of_chat(body, text, render), starts)
        return encode_json(_rendered(plan, 0, service, text, stretches, roles))

    content = await off_loop(http, service, work, record_of(http).body_bytes)
    return _json(content, with_ignored(headers, plan.ignored))


async def _require_accepted(model: str, service: Service) -> None:
    """ApiError where the engine would refuse the requests: of an absent adapter, or during shutdown."""
    if not service.client.is_admitting:
        raise from_engine(RequestRejected(DRAINING, SHUTTING_DOWN))
    await require_served(model, service)


def _rendered(
    plan: AnswerPlan,
    number: int,
    service: Service,
    text: str,
    stretches: Sequence[tuple[Stretch, int, int]],
    roles: Sequence[str] = (),
) -> dict[str, Any]:
    """The rendered form of prompt `number`; `roles` are those of the messages."""
    request = plan.requests[number * plan.candidates]
    return {
        "model": plan.model,
        "token_ids": request.prompt_token_ids,
        "count": len(request.prompt_token_ids),
        "prompt": text,
        "stretches": [
            {
                "source": stretch.source,
                "message": stretch.message,
                "role": None if stretch.message is None else roles[stretch.message],
                "text": stretch.text,
                "start": start,
                "end": end,
            }
            for stretch, start, end in stretches
        ],
        "max_tokens": request.sampling.max_tokens,
        "max_model_len": service.info.max_model_len,
    }


def _json(content: bytes, headers: dict[str, str]) -> Response:
    return Response(content, media_type="application/json", headers=headers)
