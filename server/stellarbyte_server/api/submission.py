"""Submits requests to the engine and records them in their HTTP request."""

import asyncio

from fastapi import Request

from stellarbyte_server.api.caller import limits_of, may_use, with_key
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
    """Submit requests to the engine with their key's fields and limits; see `EngineClient.submit`."""
    record = record_of(http)
    record.is_counted = True
    try:
        streams = await service.client.submit(
            *with_key(http, requests, may_use_base=may_use(http, service, service.settings.model_name)),
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
