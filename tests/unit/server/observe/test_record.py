"""What is noted of a request that never came to run."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from stellarbyte_server.api.submission import submit
from stellarbyte_server.client.delta_stream import DeltaStream
from stellarbyte_server.observe.record import RequestRecord, TokenCount
from stellarbyte_server.protocol.messages import Delta


class Queue:
    """An engine that accepts nothing."""

    async def submit(self, *requests: Any, **options: Any) -> list[DeltaStream]:
        del requests, options
        await asyncio.Event().wait()
        raise AssertionError


def test_a_client_that_leaves_the_queue_has_aborted_its_request() -> None:
    record = RequestRecord(request_id="r")
    http: Any = SimpleNamespace(scope={"state": {"record": record}})
    service: Any = SimpleNamespace(client=Queue(), settings=SimpleNamespace(model_name="m"))

    async def leave() -> None:
        waiting = asyncio.create_task(submit(http, service))
        await asyncio.sleep(0)
        assert record.finish_reason is None
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(leave())
    assert record.finish_reason == "abort"


def test_the_tokens_of_a_prediction_are_counted_when_answers_end() -> None:
    tokens = TokenCount(3, predicted=10)
    deltas = [
        Delta(request_id="a", text="", num_tokens=4),
        Delta(request_id="b", text="", num_tokens=4, finish_reason="stop", num_predicted=4),
        Delta(request_id="a", text="", num_tokens=2, finish_reason="length", num_predicted=9),
    ]
    seen = []
    for delta in deltas:
        tokens.add(delta, first_of_prompt=False)
        seen.append(tokens.usage()["completion_tokens_details"])
    assert [tuple(details.values()) for details in seen] == [(0, 0), (4, 6), (13, 7)]
    assert list(seen[0]) == ["accepted_prediction_tokens", "rejected_prediction_tokens"]
    assert "completion_tokens_details" not in TokenCount(3).usage()
