"""Writes a response from the fragments of its answer, whole or as events.

The output is an item for the reasoning, then an item for each contiguous text and each call, in the model's order.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from stellarbyte_server.api.answers.choices import Fragment
from stellarbyte_server.api.answers.responses.items import CallItem, Event, ReasoningItem, TextItem
from stellarbyte_server.api.answers.responses.logprobs import TextLogprobs
from stellarbyte_server.api.answers.sse import encode_json
from stellarbyte_server.api.answers.tool_parser import CallArguments, CallStart, Content
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.observe.record import TokenCount

Item = ReasoningItem | TextItem | CallItem


class ResponseWriter:
    """The state of one response. `fixed` has the fields that do not change.

    Each method returns the events of its change; `encoded` must encode them in order.
    """

    def __init__(self, response_id: str, fixed: Mapping[str, Any], tokens: TokenCount) -> None:
        self._id = response_id
        self._fixed = fixed
        self._tokens = tokens
        self._created_at = int(time.time())
        self._completed_at: int | None = None
        self._status = "in_progress"
        self._error: dict[str, str] | None = None
        self._finish_reason: str | None = None
        self._items: list[Item] = []
        self._called = False
        self._logprobs = TextLogprobs()
        self._num_events = 0
        self._violation: str | None = None

    def begin(self) -> list[Event]:
        response = self.response()
        return [{"type": kind, "response": response} for kind in ("response.created", "response.in_progress")]

    def add(self, fragment: Fragment) -> list[Event]:
        """Take the next fragment; the last one has a finish reason."""
        self._finish_reason, self._violation = fragment.finish_reason, fragment.schema_violation
        events = self._thought(fragment.reasoning) if fragment.reasoning else []
        entries = [] if fragment.logprobs is None else fragment.logprobs["content"]
        if fragment.pieces is None:
            return [*events, *self._text(fragment.text, entries)] if fragment.text or entries else events
        self._logprobs.add(entries)
        for piece in fragment.pieces:
            if isinstance(piece, Content):
                events += self._text(piece.text, [] if self._called else self._logprobs.take(piece.text))
            elif isinstance(piece, CallStart):
                self._called = True
                events += self._next(CallItem(self._id, len(self._items), piece.name, piece.id))
            else:
                events.append(self._argument(piece))
        return events

    def end(self) -> list[Event]:
        """Finish the response after its last fragment."""
        events: list[Event] = []
        rest = [] if self._called else self._logprobs.rest()
        if rest or not self._items:
            events += self._text("", rest)
        status = "incomplete" if self._finish_reason == "length" else "completed"
        events += self._items[-1].end("incomplete" if status == "incomplete" else "completed")
        self._status = status
        if status == "completed":
            self._completed_at = int(time.time())
        return [*events, {"type": f"response.{status}", "response": self.response()}]

    def fail(self, error: ApiError) -> list[Event]:
        """End a response whose answer failed."""
        code = "rate_limit_exceeded" if error.status == 429 else "invalid_prompt" if error.status < 500 else None
        self._error = {"code": "server_error" if code is None else code, "message": str(error)}
        self._status = "failed"
        if self._items:
            self._items[-1].status = "incomplete"
        return [
            {
                "type": "error",
                "code": "server_error" if error.code is None else error.code,
                "message": str(error),
                "param": error.param,
            },
            {"type": "response.failed", "response": self.response()},
        ]

    def response(self) -> dict[str, Any]:
        """The whole object in its current state."""
        is_cut = self._status == "incomplete"
        violation = {} if self._violation is None else {"schema_violation": self._violation}
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": self._created_at,
            "completed_at": self._completed_at,
            "status": self._status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            **self._fixed,
            "output": [item.shown() for item in self._items],
            "usage": None if self._status in ("in_progress", "failed") else self._usage(),
            **violation,
        }

    def encoded(self, events: list[Event]) -> bytes:
        return b"".join(self._encoded(events))

    def _encoded(self, events: list[Event]) -> Iterator[bytes]:
        for event in events:
            content = {"type": event["type"], "sequence_number": self._num_events} | event
            self._num_events += 1
            yield f"event: {event['type']}\n".encode() + b"data: " + encode_json(content) + b"\n\n"

    def _thought(self, text: str) -> list[Event]:
        events: list[Event] = []
        if not self._items or not isinstance(self._items[-1], ReasoningItem):
            events += self._next(ReasoningItem(self._id, len(self._items)))
        item = self._items[-1]
        assert isinstance(item, ReasoningItem)
        return [*events, item.add(text)]

    def _text(self, text: str, logprobs: list[dict[str, Any]]) -> list[Event]:
        events: list[Event] = []
        if not self._items or not isinstance(self._items[-1], TextItem):
            events += self._next(TextItem(self._id, len(self._items)))
        item = self._items[-1]
        assert isinstance(item, TextItem)
        return [*events, item.add(text, logprobs)] if text or logprobs else events

    def _argument(self, piece: CallArguments) -> Event:
        item = self._items[-1]
        assert isinstance(item, CallItem), "arguments follow the start of their call"
        return item.add(piece.text)

    def _next(self, item: Item) -> list[Event]:
        """Begin an item; this ends the previous item."""
        events = self._items[-1].end("completed") if self._items else []
        self._items.append(item)
        return [*events, *item.begin()]

    def _usage(self) -> dict[str, Any]:
        tokens = self._tokens
        return {
            "input_tokens": tokens.prompt,
            "input_tokens_details": {"cached_tokens": tokens.cached, "cache_write_tokens": 0},
            "output_tokens": tokens.completion,
            "output_tokens_details": {"reasoning_tokens": tokens.reasoning or 0},
            "total_tokens": tokens.prompt + tokens.completion,
        }
