"""Encodes streamed answers and sends them as server-sent events.

The constant JSON of a chunk is encoded once per choice; for a delta of text alone only the text is encoded, so that one
process can serve hundreds of fast streams.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from stellarbyte_server.api.answers.choices import Fragment, Kind, reasoning_fields
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.client.delta_stream import DeltaStream

logger = logging.getLogger("server.http")

PING_INTERVAL_S = 15
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"

encode_json = msgspec.json.encode  # newlines and control characters are escaped, so JSON never breaks an event


def event(content: Any) -> bytes:
    return b"data: " + encode_json(content) + b"\n\n"


class ChunkWriter:
    """Encodes the events of one answer. `base` has the fields common to all chunks.

    With `include_usage` every chunk has a usage field, which is null except in the last chunk; with `usage_so_far` it
    is the usage so far.
    """

    def __init__(
        self,
        base: dict[str, Any],
        kind: Kind,
        num_choices: int,
        *,
        include_usage: bool,
        usage_so_far: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self._base = base
        self._usage_so_far = usage_so_far
        self._kind = kind
        head = b"data: " + encode_json(base)[:-1] + b',"choices":[{"index":'
        self._heads = [head + str(index).encode() + b"," for index in range(num_choices)]
        self._fixed_tail = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        before, after = (b'"delta":{"content":', b"}") if kind == "chat" else (b'"text":', b"")
        self._before_text = [head + before for head in self._heads]
        self._after_text = after + b',"logprobs":null,"finish_reason":null'
        self._last_choice = b'"delta":{}' if kind == "chat" else b'"text":""'

    @property
    def _tail(self) -> bytes:
        if self._usage_so_far is None:
            return self._fixed_tail
        return b'}],"usage":' + encode_json(self._usage_so_far()) + b"}\n\n"

    def role(self, index: int, content: str | None = "", prompt_token_ids: Sequence[int] | None = None) -> bytes:
        """The first chunk of a chat's choice; content None: the choice has no text."""
        head = self._heads[index]
        if prompt_token_ids is not None:
            head = head.replace(b',"choices":', b',"prompt_token_ids":%s,"choices":' % encode_json(prompt_token_ids), 1)
        delta = b'"delta":{"role":"assistant","content":%s}' % encode_json(content)
        return head + delta + b',"logprobs":null,"finish_reason":null' + self._tail

    def fragment(self, index: int, fragment: Fragment) -> bytes:
        """The chunks of a fragment; b"" if it is empty. A finish reason is sent in a separate last chunk."""
        chunk = b""
        if fragment.text and fragment.is_text:
            chunk = self._before_text[index] + encode_json(fragment.text) + self._after_text + self._tail
        elif not fragment.is_empty:
            chunk = self._heads[index] + encode_json(self._choice(fragment))[1:-1] + self._tail
        if fragment.finish_reason is not None:
            reason = b',"logprobs":null,"finish_reason":' + encode_json(fragment.finish_reason)
            reason += b',"stop_reason":' + encode_json(fragment.stop_reason)
            if fragment.schema_violation is not None:
                reason += b',"schema_violation":' + encode_json(fragment.schema_violation)
            chunk += self._heads[index] + self._last_choice + reason + self._tail
        return chunk

    def usage(self, usage: dict[str, Any]) -> bytes:
        return event(self._base | {"choices": [], "usage": usage})

    def _choice(self, fragment: Fragment) -> dict[str, Any]:
        choice: dict[str, Any] = {}
        if self._kind == "chat":
            delta: dict[str, Any] = reasoning_fields(fragment.reasoning)
            if fragment.text:
                delta["content"] = fragment.text
            choice["delta"] = delta | fragment.call_fields
        else:
            choice["text"] = fragment.text
        choice |= {"logprobs": fragment.logprobs, "finish_reason": None}
        if fragment.token_ids is not None:
            choice["token_ids"] = fragment.token_ids
        if fragment.prompt_token_ids is not None and self._kind == "completion":  # a chat's first chunk has them
            choice["prompt_token_ids"] = fragment.prompt_token_ids
        return choice


class StreamForm(NamedTuple):
    """An API's keep-alive and error events."""

    ping: Callable[[], ServerSentEvent]
    failure: Callable[[ApiError], bytes]


OPENAI_STREAM = StreamForm(
    ping=lambda: ServerSentEvent(comment="ping", sep="\n"), failure=lambda error: event(error.content())
)


async def _told_of_failure(
    events: AsyncIterator[bytes], streams: Sequence[DeltaStream], form: StreamForm
) -> AsyncIterator[bytes]:
    """The events. If one raises, the last event is an error, because the headers with the status have been sent."""
    try:
        async for content in events:
            yield content
    except Exception:
        request_id = streams[0].request_id if streams else "that waits"
        logger.exception("the answer to request %s could not be sent", request_id)
        yield form.failure(ApiError(500, "The server failed while it sent this answer."))


Submission = asyncio.Future[list[DeltaStream]]


def abandon(submission: Submission) -> None:
    """Cancel a submission, or abort its requests if it has just completed."""
    submission.add_done_callback(_close_submitted)
    submission.cancel()


def _close_submitted(submission: Submission) -> None:
    if not submission.cancelled() and submission.exception() is None:
        for stream in submission.result():
            stream.close()


class DeltaStreamResponse(EventSourceResponse):
    """Sends `events`, which read `streams`. When the response ends or the client disconnects, the requests of `streams`
    and of a `pending` submission are aborted.
    """

    def __init__(
        self,
        streams: Sequence[DeltaStream],
        events: AsyncIterator[bytes],
        headers: dict[str, str],
        form: StreamForm = OPENAI_STREAM,
        pending: Submission | None = None,
    ) -> None:
        super().__init__(
            _told_of_failure(events, streams, form),
            headers=headers,
            ping=PING_INTERVAL_S,
            sep="\n",
            ping_message_factory=form.ping,
        )
        self._streams = streams
        self._pending = pending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._pending is not None:
                abandon(self._pending)
            for stream in self._streams:
                stream.close()
