"""Streams that wait in the queue: what is submitted as their client leaves is aborted."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from stellarbyte_server.api.answers import queueing
from stellarbyte_server.api.answers.sse import DeltaStreamResponse
from stellarbyte_server.api.disconnect import ClientLeft
from stellarbyte_server.client.delta_stream import DeltaStream


class Stream:
    is_open = True

    def close(self) -> None:
        self.is_open = False


async def never(_: list[DeltaStream]) -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


@pytest.mark.parametrize("num_ticks_later", range(8))
def test_a_client_that_leaves_as_its_request_is_submitted_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, num_ticks_later: int
) -> None:
    stream, submitted = Stream(), list[Stream]()

    async def run() -> None:
        left = asyncio.Event()

        async def submit(*_: Any) -> list[Any]:
            await left.wait()
            for _ in range(num_ticks_later):
                await asyncio.sleep(0)
            submitted.append(stream)
            return [stream]

        async def receive() -> dict[str, str]:
            await left.wait()
            return {"type": "http.disconnect"}

        monkeypatch.setattr(queueing, "submit", submit)
        http: Any = SimpleNamespace(receive=receive)
        service: Any = None
        asyncio.get_running_loop().call_later(0.001, left.set)
        try:
            response = await queueing.stream_when_running(http, service, (), never, {})
        except ClientLeft:
            await asyncio.sleep(0.001)
        else:
            await send(response)

    asyncio.run(run())
    assert not (submitted and stream.is_open)


async def send(response: DeltaStreamResponse) -> None:
    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def ignore(_: Any) -> None:
        pass

    await response({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, ignore)


def test_a_client_that_leaves_before_a_late_submission_is_read_leaves_nothing() -> None:
    stream = Stream()

    async def run() -> None:
        submitted: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        submitted.set_result([stream])
        await send(DeltaStreamResponse([], never([]), {}, pending=submitted))
        await asyncio.sleep(0)

    asyncio.run(run())
    assert not stream.is_open
