"""Streamed answers: chunks as ready bytes, and the response that sends them. Knows no requests.

A chunk's JSON is made once per answer; for every delta only its text is escaped and set in, which is what lets one
process carry hundreds of fast streams.
"""

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from server.engine.client import DeltaStream

PING_INTERVAL_S = 15
DONE = b"data: [DONE]\n\n"

encode_json = msgspec.json.encode  # newlines and control characters are escaped, so JSON never breaks an event


def event(content: Any) -> bytes:
    return b"data: " + encode_json(content) + b"\n\n"


class ChunkWriter:
    """The events of one answer. `base` holds the fields that all its chunks share.

    With `include_usage` every chunk has a usage field, null in all but the last.
    """

    def __init__(self, base: dict[str, Any], *, is_chat: bool, include_usage: bool) -> None:
        self._base = base
        self._head = b"data: " + encode_json(base)[:-1] + b',"choices":[{"index":0,'
        self._tail = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        before, after = (b'"delta":{"content":', b"}") if is_chat else (b'"text":', b"")
        self._before_text = self._head + before
        self._after_text = after + b',"logprobs":null,"finish_reason":null' + self._tail
        self._last_choice = b'"delta":{}' if is_chat else b'"text":""'

    def text(self, text: str) -> bytes:
        return self._before_text + encode_json(text) + self._after_text

    def role(self) -> bytes:
        """The first chunk of a chat."""
        choice = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        return self._head + choice + self._tail

    def finish(self, reason: str) -> bytes:
        return self._head + self._last_choice + b',"logprobs":null,"finish_reason":' + encode_json(reason) + self._tail

    def usage(self, usage: dict[str, Any]) -> bytes:
        return event(self._base | {"choices": [], "usage": usage})


def _ping() -> ServerSentEvent:
    return ServerSentEvent(comment="ping", sep="\n")


class DeltaStreamResponse(EventSourceResponse):
    """Sends `events`, made from `stream`; the request is aborted when the client leaves, from the first byte on."""

    def __init__(self, stream: DeltaStream, events: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        super().__init__(events, headers=headers, ping=PING_INTERVAL_S, sep="\n", ping_message_factory=_ping)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()
