"""POST /v1/chat/completions."""

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.answers.answer import AnswerPlan, answer
from stellarbyte_server.api.answers.choices import ChoiceForm, ChoiceReader
from stellarbyte_server.api.answers.tool_parser import ToolCallParser
from stellarbyte_server.api.caller import owner_of
from stellarbyte_server.api.chat_prompt import chat_encoder, check_continuation, content_characters
from stellarbyte_server.api.contract import objects
from stellarbyte_server.api.contract.bodies.chat import ChatBody, ResponseFormat
from stellarbyte_server.api.contract.errors import bad_request
from stellarbyte_server.api.contract.operation import GENERATION_REFUSED, Operation
from stellarbyte_server.api.generation import (
    MAX_TOKENS_AT_ONCE,
    Bounds,
    Prompt,
    check_body,
    check_characters,
    check_prompt,
    make_requests,
    off_loop,
    read_body,
)
from stellarbyte_server.api.service import Service, ServiceOfRequest
from stellarbyte_server.api.structured.grammars import checked, json_grammar, json_rule
from stellarbyte_server.api.submission import record_of
from stellarbyte_server.api.tools import Toolbox
from stellarbyte_server.tokens.tokenizer import ChatTemplateError, UnembeddableTokenError

router = APIRouter()

DEFAULT_SLIDING_MAX_TOKENS = 4096


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
    plan = await plan_chat(http, body, service)
    return await answer(http, service, plan, headers)


async def plan_chat(http: Request, body: ChatBody, service: Service) -> AnswerPlan:
    """What to run for a chat and how to answer it; ApiError."""
    _check(body, service)
    bounds = Bounds.of(http, body, service)
    toolbox = Toolbox.of(body.tools, body.tool_choice, body.parallel_tool_calls, service.tokenizer.chat_template_source)
    grammar, grammar_param = await _grammar(http, body, service, toolbox)
    token_ids = await _encode(http, body, service, toolbox, bounds.context)
    room = check_prompt(token_ids, bounds.context, "messages")
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if wanted is None:  # to the end of the context, if it has one
        wanted = bounds.default_tokens(DEFAULT_SLIDING_MAX_TOKENS if bounds.overflow == "slide" else room)
        wanted = min(wanted, MAX_TOKENS_AT_ONCE // (body.num_candidates * (1 + (body.top_logprobs or 0))))
    prompt = Prompt(token_ids=token_ids, max_tokens=min(wanted, room))
    logprobs = None
    if body.logprobs:
        logprobs = 0 if body.top_logprobs is None else body.top_logprobs
    form = ChoiceForm(
        kind="chat",
        logprobs=logprobs,
        prompt_token_ids=token_ids if body.return_token_ids else None,
        with_tools=toolbox is not None,
    )

    def reader(_: int) -> ChoiceReader:
        parser = None if toolbox is None else ToolCallParser(toolbox.format, toolbox.names)
        return ChoiceReader(form, service.tokenizer.token_bytes, parser)

    return AnswerPlan(
        kind="chat",
        model=body.model,
        requests=make_requests(body, service, [prompt], bounds, logprobs=logprobs, grammar=grammar),
        grammar_param=grammar_param,
        candidates=body.num_candidates,
        choices=body.num_choices,
        reader=reader,
        stream=bool(body.stream),
        include_usage=body.include_usage,
    )


def _check(body: ChatBody, service: Service) -> None:
    check_body(body, 1, service)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise bad_request("'max_tokens' and 'max_completion_tokens' differ; give one of them.", "max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise bad_request("The field 'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
    check_continuation(body)
    wanted = body.response_format
    if body.continue_final_message and wanted is not None and wanted.type != "text":
        raise bad_request(
            "'continue_final_message' cannot be combined with 'response_format': a begun answer is not looked at.",
            "continue_final_message",
        )


async def _grammar(
    http: Request, body: ChatBody, service: Service, toolbox: Toolbox | None
) -> tuple[str | None, str | None]:
    """What the answer has to be (None: any text), and the field that says so; ApiError when it cannot be enforced."""
    wanted = body.response_format
    if wanted is not None and wanted.type == "text":
        wanted = None
    offered = toolbox if toolbox is not None and toolbox.names else None
    if wanted is None and offered is None:
        return None, None

    def grammar() -> str | None:
        if offered is not None:
            return offered.grammar(None if wanted is None else json_rule("content", _schema(wanted)))
        return None if wanted is None else json_grammar(_schema(wanted))

    param = "tools" if wanted is None else "response_format"
    num_bytes = record_of(http).body_bytes  # schemas may be large
    if wanted is not None and offered is not None:  # an error should name the one that it is in
        of_format = await off_loop(http, service, partial(json_grammar, _schema(wanted)), num_bytes)
        await checked(of_format, "response_format", service.text_work, owner_of(http))
        param = "tools"
    text = await off_loop(http, service, grammar, num_bytes)
    return (None, None) if text is None else (await checked(text, param, service.text_work, owner_of(http)), param)


def _schema(wanted: ResponseFormat) -> dict[str, Any]:
    if wanted.json_schema is None:
        return {"type": "object"}
    return {} if wanted.json_schema.schema_ is None else wanted.json_schema.schema_


async def _encode(http: Request, body: ChatBody, service: Service, toolbox: Toolbox | None, limit: int) -> list[int]:
    """The chat as token ids; ApiError when the template refuses it, or the model cannot read it."""
    check_characters(content_characters(body), limit, service, "messages")
    try:
        return await off_loop(http, service, chat_encoder(body, service, toolbox), record_of(http).body_bytes)
    except (ChatTemplateError, UnembeddableTokenError) as error:
        raise bad_request(str(error), "messages") from None
