"""What is noted of a request that never came to run."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from stellarbyte_server.api.submission import submit
from stellarbyte_server.client.delta_stream import DeltaStream
from stellarbyte_server.observe.record import RequestRecord


class Queue:
    """An engine that accepts nothing."""

    async def submit(self, *requests: Any, **options: Any) -> list[DeltaStream]:
        del requests, options
        await asyncio.Event().wait()
        raise AssertionError


def test_a_client_that_leaves_the_queue_has_aborted_its_request() -> None:
    record = RequestRecord(request_id="r")
    http: Any = SimpleNamespace(scope={"state": {"record": record}})
    service: Any = SimpleNamespace(client=Queue())

    async def leave() -> None:
        waiting = asyncio.create_task(submit(http, service))
        await asyncio.sleep(0)
        assert record.finish_reason is None
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(leave())
    assert record.finish_reason == "abort"
