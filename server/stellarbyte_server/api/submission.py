"""Requests are submitted to the engine and noted in the record of their HTTP request."""

import asyncio

from fastapi import Request

from stellarbyte_server.api.caller import limits_of, with_key
from stellarbyte_server.api.service import Service
from stellarbyte_server.client.delta_stream import DeltaStream
from stellarbyte_server.observe.record import RequestRecord
from stellarbyte_server.protocol.request import GenerationRequest


def record_of(http: Request) -> RequestRecord:
    record = http.scope["state"]["record"]
    assert isinstance(record, RequestRecord)
    return record


async def submit(
    http: Request,
    service: Service,
    *requests: GenerationRequest,
    continues: bool = False,
    num_later_tokens: int = 0,
) -> list[DeltaStream]:
    """Hand an HTTP request's work to the engine, with what its key adds and allows; as `EngineClient.submit`."""
    record = record_of(http)
    record.is_counted = True
    try:
        streams = await service.client.submit(
            *with_key(http, requests),
            limits=limits_of(http),
            continues=continues,
            num_later_tokens=num_later_tokens,
            arrived_s=record.arrived_s,
        )
    except asyncio.CancelledError:
        record.left_queue = True
        raise
    record.streams += streams
    return streams
