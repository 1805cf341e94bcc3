"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API. Requests run as chats."""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.answers.answer import AnswerPlan, count_tokens, note_adapter, read_deltas
from stellarbyte_server.api.answers.ends import AnswerEnds
from stellarbyte_server.api.answers.messages import (
    MessageWriter,
    Step,
    message_event,
    message_ping,
    whole_blocks,
)
from stellarbyte_server.api.answers.queueing import stream_when_running
from stellarbyte_server.api.answers.sse import StreamForm, encode_json
from stellarbyte_server.api.chat.plan import plan_chat
from stellarbyte_server.api.chat.prompt import chat_encoder
from stellarbyte_server.api.chat.reasoning import template_variables
from stellarbyte_server.api.chat.tools import Toolbox
from stellarbyte_server.api.contract import message_objects
from stellarbyte_server.api.contract.bodies.anthropic.as_chat import as_chat, without_effect
from stellarbyte_server.api.contract.bodies.anthropic.messages import CountTokensBody, MessagesBody
from stellarbyte_server.api.contract.bodies.chat import ChatBody
from stellarbyte_server.api.contract.errors import ApiError, bad_request, from_engine
from stellarbyte_server.api.contract.operation import GENERATION_REFUSED, Operation
from stellarbyte_server.api.disconnect import unless_client_leaves
from stellarbyte_server.api.generation import off_loop, off_loop_if_long, read_body, with_ignored
from stellarbyte_server.api.key_rate import charge
from stellarbyte_server.api.routes.tokenize import require_served
from stellarbyte_server.api.service import Service, ServiceOfRequest
from stellarbyte_server.api.submission import record_of, submit
from stellarbyte_server.client.delta_stream import DeltaStream
from stellarbyte_server.client.engine_client import EngineDead
from stellarbyte_server.protocol.request import RequestRejected
from stellarbyte_server.tokens.tokenizer import ChatTemplateError, UnembeddableTokenError

router = APIRouter()
InTerms = Callable[[ApiError], ApiError]  # converts an error to the names of Anthropic's fields


@router.post("/v1/messages")
@Operation(
    access=Access.USER,
    summary="Answer a chat, in the format of Anthropic's Messages API",
    tag="Generation",
    bodies=(MessagesBody,),
    answer=message_objects.AssistantMessage,
    event=message_objects.MessageEvent,
    ends_with_done=False,
    errors=GENERATION_REFUSED,
    error=message_objects.MessagesError,
)
async def create_message(http: Request, service: ServiceOfRequest) -> Response:
    body, headers = await read_body(http, service, MessagesBody)
    chat, in_terms = await _chat(http, service, body)
    with _errors(in_terms):
        plan = await plan_chat(http, chat, service)
        writer = MessageWriter(
            message_id=f"msg_{plan.requests[0].request_id}",
            model=body.model,
            tokens=count_tokens(http, plan.requests),
            ends_with_context=plan.requests[0].sampling.max_tokens < body.max_tokens,
            omits_thinking=body.thinking is not None and body.thinking.display == "omitted",
        )
        headers = with_ignored(headers, _without_effect(body, plan.ignored, service))
        if not body.stream:
            steps = await unless_client_leaves(http.receive, _read(http, service, plan, writer))
            message = writer.message(whole_blocks(steps))
            return Response(encode_json(message), media_type="application/json", headers=headers)

        def failure(error: ApiError) -> bytes:
            return message_event(in_terms(error).anthropic_content(record_of(http).request_id))

        def events(streams: list[DeltaStream]) -> AsyncIterator[bytes]:
            note_adapter(http, plan.requests[0], streams)
            return _events(streams[0], plan, writer, failure, AnswerEnds.of(http, service, plan))

        form = StreamForm(ping=message_ping, failure=failure)
        return await stream_when_running(http, service, plan.requests, events, headers, plan.grammar_param, form)


@router.post("/v1/messages/count_tokens")
@Operation(
    access=Access.USER,
    summary="Count the tokens of a message's prompt",
    tag="Generation",
    bodies=(CountTokensBody,),
    answer=message_objects.MessageTokenCount,
    errors=GENERATION_REFUSED,
    error=message_objects.MessagesError,
)
async def count_message_tokens(http: Request, service: ServiceOfRequest) -> Response:
    await charge(http, service)
    body, headers = await read_body(http, service, CountTokensBody)
    await require_served(body.model, service)
    chat, in_terms = await _chat(http, service, body)
    with _errors(in_terms):
        source = service.tokenizer.chat_template_source
        toolbox = Toolbox.of(chat.tools, chat.tool_choice, chat.parallel_tool_calls, source)
        variables = template_variables(chat.chat_template_kwargs, chat.reasoning_effort, service, toolbox)
        encode = chat_encoder(chat, service, toolbox, variables.values)
        try:
            token_ids = await off_loop(http, service, encode, record_of(http).body_bytes)
        except (ChatTemplateError, UnembeddableTokenError) as error:
            raise bad_request(str(error), "messages") from None
    headers = with_ignored(headers, _without_effect(body, variables.ignored, service))
    return Response(encode_json({"input_tokens": len(token_ids)}), media_type="application/json", headers=headers)


async def _chat(http: Request, service: Service, body: CountTokensBody) -> tuple[ChatBody, InTerms]:
    chat, in_terms = await off_loop_if_long(http, service, partial(as_chat, body), record_of(http).body_bytes)
    if service.reasoning is None:  # clients send a budget even if the model does not think
        chat = chat.model_copy(update={"max_reasoning_tokens": None})
    return chat, in_terms


def _without_effect(body: CountTokensBody, ignored: Sequence[str], service: Service) -> list[str]:
    return without_effect(body, ignored, thinks=service.reasoning is not None)


@contextmanager
def _errors(in_terms: InTerms) -> Iterator[None]:
    """Raise errors, including those of the engine, with the names of the request's fields."""
    try:
        yield
    except ApiError as error:
        raise in_terms(error) from None
    except (RequestRejected, EngineDead) as error:
        raise in_terms(from_engine(error)) from None


async def _read(http: Request, service: Service, plan: AnswerPlan, writer: MessageWriter) -> list[Step]:
    """The whole answer."""
    (stream,) = await submit(http, service, *plan.requests)
    reader, ends = plan.reader(0), AnswerEnds.of(http, service, plan)
    steps: list[Step] = []
    try:
        note_adapter(http, plan.requests[0], [stream])
        async for _, delta in read_deltas([stream], writer.tokens, grammar_param=plan.grammar_param):
            steps += writer.steps(await ends.note(0, reader.read(delta)), delta)
    finally:
        stream.close()
    return steps


async def _events(
    stream: DeltaStream,
    plan: AnswerPlan,
    writer: MessageWriter,
    failure: Callable[[ApiError], bytes],
    ends: AnswerEnds,
) -> AsyncIterator[bytes]:
    """The answer as server-sent events; a failure is the last event."""
    reader = plan.reader(0)
    yield writer.begin()
    try:
        async for _, delta in read_deltas([stream], writer.tokens, grammar_param=plan.grammar_param):
            if events := writer.events(writer.steps(await ends.note(0, reader.read(delta)), delta)):
                yield events
    except ApiError as error:
        yield failure(error)
        return
    yield writer.end()
