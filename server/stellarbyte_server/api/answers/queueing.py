"""Streams that wait in the queue: their headers are sent before proxies time out."""

import asyncio
from collections.abc import AsyncIterator, Callable

from fastapi import Request

from stellarbyte_server.api.answers.sse import OPENAI_STREAM, PING, DeltaStreamResponse, StreamForm, Submission, abandon
from stellarbyte_server.api.contract.errors import from_engine
from stellarbyte_server.api.disconnect import unless_client_leaves
from stellarbyte_server.api.service import Service
from stellarbyte_server.api.submission import record_of, submit
from stellarbyte_server.client.delta_stream import DeltaStream
from stellarbyte_server.client.engine_client import EngineDead
from stellarbyte_server.protocol.request import GenerationRequest, RequestRejected

HEADERS_AFTER_S = 10.0  # of waiting; until then, a refusal has its own status

Events = Callable[[list[DeltaStream]], AsyncIterator[bytes]]


async def stream_when_running(
    http: Request,
    service: Service,
    requests: tuple[GenerationRequest, ...],
    events: Events,
    headers: dict[str, str],
    grammar_param: str | None = None,
    form: StreamForm = OPENAI_STREAM,
) -> DeltaStreamResponse:
    """Submit requests and stream their `events`, as soon as one of them runs or after `HEADERS_AFTER_S`.

    Raises RequestRejected, EngineDead or ClientLeft before that. Later, a refusal is the stream's only event.
    """
    submitting = asyncio.ensure_future(submit(http, service, *requests))
    try:
        await unless_client_leaves(http.receive, _for_a_while(submitting))
    except BaseException:
        abandon(submitting)
        await asyncio.gather(submitting, return_exceptions=True)
        raise
    if submitting.done():
        streams = submitting.result()
        return DeltaStreamResponse(streams, events(streams), headers, form)
    streams = []

    async def late() -> AsyncIterator[bytes]:
        yield PING
        try:
            streams.extend(await submitting)
        except (RequestRejected, EngineDead) as error:
            refused = from_engine(error, grammar_param)
            record = record_of(http)
            record.error_code, record.late_status = refused.code, refused.status
            yield form.failure(refused)
            return
        async for event in events(streams):
            yield event

    return DeltaStreamResponse(streams, late(), headers, form, pending=submitting)


async def _for_a_while(submitting: Submission) -> None:
    await asyncio.wait({submitting}, timeout=HEADERS_AFTER_S)
