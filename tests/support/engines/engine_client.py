"""Requests to an engine process from Python, and their answers."""

import asyncio
from collections.abc import Callable

from stellarbyte_server.client.delta_stream import DeltaStream
from stellarbyte_server.protocol.messages import Delta
from stellarbyte_server.protocol.request import GenerationRequest, SamplingParams


def a_request(text: str, request_id: str = "r", max_tokens: int = 10) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=max_tokens, seed=1)
    return GenerationRequest(request_id=request_id, prompt_token_ids=tuple(text.encode()), sampling=sampling)


async def read(stream: DeltaStream) -> tuple[str, list[Delta]]:
    deltas = [delta async for delta in stream]
    return "".join(delta.text for delta in deltas), deltas


async def until(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.02)
