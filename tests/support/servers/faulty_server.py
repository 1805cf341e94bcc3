"""`python -m tests.support.servers.faulty_server FLAGS`: the server with faults planted on both sides of its socket.

Faults of the engine: `faulty_engine`. Here: texts with `UNREADABLE` cannot be tokenized, and answers to requests with
the `cache_salt` `UNSENDABLE` break off after their first part.
"""

import sys
from typing import Any
from unittest import mock

from stellarbyte_server.__main__ import main
from stellarbyte_server.client.delta_stream import DeltaStream
from stellarbyte_server.client.engine_client import EngineClient
from stellarbyte_server.protocol.messages import Delta
from stellarbyte_server.tokens.tokenizer import PromptTokenizer
from tests.support.servers.faulty_engine import PlantedError, salt_given

UNREADABLE = "!unreadable"
UNSENDABLE = "fault:send"


def plant() -> None:
    encode, submit, following = PromptTokenizer.encode, EngineClient.submit, DeltaStream.__anext__
    unsendable: set[str] = set()
    begun: set[str] = set()

    def faulty_encode(self: PromptTokenizer, text: str, *rest: Any) -> list[int]:
        if UNREADABLE in text:
            raise PlantedError
        return encode(self, text, *rest)

    async def noting_submit(self: EngineClient, *requests: Any, **options: Any) -> list[DeltaStream]:
        unsendable.update(request.request_id for request in requests if salt_given(request) == UNSENDABLE)
        return await submit(self, *requests, **options)

    async def faulty_anext(self: DeltaStream) -> Delta:
        delta = await following(self)
        if self.request_id in begun:
            raise PlantedError
        if self.request_id in unsendable:
            begun.add(self.request_id)
        return delta

    mock.patch.object(PromptTokenizer, "encode", faulty_encode).start()
    mock.patch.object(EngineClient, "submit", noting_submit).start()
    mock.patch.object(DeltaStream, "__anext__", faulty_anext).start()


if __name__ == "__main__":
    plant()
    sys.exit(main(engine_module="tests.support.servers.faulty_engine"))
