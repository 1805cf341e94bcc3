"""POST /v1/responses: OpenAI's newer chat API, text only and stateless. Requests run as chats."""

from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.answers.answer import AnswerPlan, count_tokens, note_adapter, read_deltas
from stellarbyte_server.api.answers.ends import AnswerEnds
from stellarbyte_server.api.answers.queueing import stream_when_running
from stellarbyte_server.api.answers.responses.fields import response_fields
from stellarbyte_server.api.answers.responses.writer import ResponseWriter
from stellarbyte_server.api.answers.sse import OPENAI_STREAM, StreamForm, encode_json
from stellarbyte_server.api.chat.plan import plan_chat
from stellarbyte_server.api.contract import response_objects
from stellarbyte_server.api.contract.bodies.responses.body import LOGPROBS, ResponsesBody
from stellarbyte_server.api.contract.bodies.responses.chat import ResponseChat
from stellarbyte_server.api.contract.errors import ApiError, bad_request, from_engine
from stellarbyte_server.api.contract.operation import GENERATION_REFUSED, Operation
from stellarbyte_server.api.disconnect import unless_client_leaves
from stellarbyte_server.api.generation import off_loop_if_long, read_body, with_ignored
from stellarbyte_server.api.service import Service, ServiceOfRequest
from stellarbyte_server.api.submission import record_of, submit
from stellarbyte_server.client.delta_stream import DeltaStream
from stellarbyte_server.client.engine_client import EngineDead
from stellarbyte_server.observe.record import TokenCount
from stellarbyte_server.protocol.request import RequestRejected

router = APIRouter()


@router.post("/v1/responses")
@Operation(
    access=Access.USER,
    summary="Answer a chat, in the format of OpenAI's Responses API",
    tag="Generation",
    bodies=(ResponsesBody,),
    answer=response_objects.Response,
    event=response_objects.ResponseEvent,
    ends_with_done=False,
    errors=GENERATION_REFUSED,
)
async def create_response(http: Request, service: ServiceOfRequest) -> Response:
    body, headers = await read_body(http, service, ResponsesBody)
    _check(body)
    plan = await _plan(http, body, service)
    headers = with_ignored(headers, [*plan.ignored, *body.without_effect])
    tokens = count_tokens(http, plan.requests)
    request = plan.requests[0]
    writer = ResponseWriter(request.request_id, response_fields(body, request), tokens)
    try:
        if body.stream:

            def events(streams: list[DeltaStream]) -> AsyncIterator[bytes]:
                note_adapter(http, request, streams)
                return _events(streams[0], plan, writer, tokens, AnswerEnds.of(http, service, plan))

            form = StreamForm(ping=OPENAI_STREAM.ping, failure=lambda error: writer.encoded(writer.fail(error)))
            return await stream_when_running(http, service, plan.requests, events, headers, plan.grammar_param, form)
        await unless_client_leaves(http.receive, _read(http, service, plan, writer, tokens))
    except (RequestRejected, EngineDead) as error:
        raise from_engine(error, plan.grammar_param) from None
    return Response(encode_json(writer.response()), media_type="application/json", headers=headers)


def _check(body: ResponsesBody) -> None:
    """ApiError if fields refer to a stored response, or need a missing field."""
    if body.previous_response_id is not None:
        raise bad_request(
            "Responses are not stored, so none can be continued; give the whole conversation as 'input'.",
            "previous_response_id",
        )
    if body.top_logprobs and not body.with_logprobs:
        raise bad_request(f"The field 'top_logprobs' needs '{LOGPROBS}' in 'include'.", "top_logprobs")


async def _plan(http: Request, body: ResponsesBody, service: Service) -> AnswerPlan:
    """The plan of a response; ApiError with the names of the response's fields."""
    chat = await off_loop_if_long(http, service, partial(ResponseChat.of, body), record_of(http).body_bytes)
    try:
        plan = await plan_chat(http, chat.body, service)
    except ApiError as error:
        raise chat.renamed(error) from None
    ignored = tuple(str(chat.name_of(path)) for path in plan.ignored)
    return replace(plan, grammar_param=chat.name_of(plan.grammar_param), ignored=ignored)


async def _read(http: Request, service: Service, plan: AnswerPlan, writer: ResponseWriter, tokens: TokenCount) -> None:
    (stream,) = await submit(http, service, *plan.requests)
    reader, ends = plan.reader(0), AnswerEnds.of(http, service, plan)
    try:
        note_adapter(http, plan.requests[0], [stream])
        async for _, delta in read_deltas([stream], tokens, grammar_param=plan.grammar_param):
            writer.add(await ends.note(0, reader.read(delta)))
    finally:
        stream.close()
    writer.end()


async def _events(
    stream: DeltaStream, plan: AnswerPlan, writer: ResponseWriter, tokens: TokenCount, ends: AnswerEnds
) -> AsyncIterator[bytes]:
    reader = plan.reader(0)
    yield writer.encoded(writer.begin())
    try:
        async for _, delta in read_deltas([stream], tokens, grammar_param=plan.grammar_param):
            if events := writer.add(await ends.note(0, reader.read(delta))):
                yield writer.encoded(events)
    except ApiError as error:
        yield writer.encoded(writer.fail(error))
        return
    yield writer.encoded(writer.end())
