"""Answers in the format of Anthropic's API: a message of content blocks, whole or as events.

Streamed and unstreamed messages are made from the same steps, so both have the same content.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pydantic_core import from_json
from sse_starlette import ServerSentEvent

from stellarbyte_server.api.answers.choices import Fragment
from stellarbyte_server.api.answers.sse import encode_json
from stellarbyte_server.api.answers.tool_parser import CallStart, Content
from stellarbyte_server.observe.record import TokenCount
from stellarbyte_server.protocol.messages import Delta

Kind = Literal["thinking", "text", "tool_use"]
_DELTAS = {
    "thinking": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "tool_use": ("input_json_delta", "partial_json"),
}
_EMPTY: dict[Kind, dict[str, Any]] = {
    "thinking": {"thinking": "", "signature": ""},
    "text": {"text": ""},
    "tool_use": {"input": {}},
}
SIGNATURE = "c3RlbGxhcmJ5dGU="  # of all thinking; never verified, but clients do not return thinking without one
_STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}


class BlockStart(NamedTuple):
    kind: Kind
    head: dict[str, Any]  # the block's fields that are known from the start


class BlockText(NamedTuple):
    """A part of the open block's thinking, text, or input as JSON."""

    text: str


class BlockSignature(NamedTuple):
    """The open block is thinking, and its text is complete."""


class BlockStop(NamedTuple):
    """The open block is complete."""


Step = BlockStart | BlockText | BlockSignature | BlockStop


class BlockReader:
    """Divides the fragments of an answer into content blocks; at most one is open."""

    def __init__(self, *, omits_thinking: bool = False) -> None:
        self._open: Kind | None = None
        self._omits_thinking = omits_thinking  # blocks of thinking have no text

    def read(self, fragment: Fragment) -> Iterator[Step]:
        if fragment.reasoning:
            if self._open != "thinking":
                yield from self._begin("thinking", {})
            if not self._omits_thinking:
                yield BlockText(fragment.reasoning)
        pieces = fragment.pieces or ([Content(fragment.text)] if fragment.text else [])
        for piece in pieces:
            if isinstance(piece, CallStart):
                head = {"id": "toolu_" + piece.id.removeprefix("call_"), "name": piece.name}
                yield from self._begin("tool_use", head)
                continue
            if isinstance(piece, Content) and self._open != "text":
                yield from self._begin("text", {})
            if piece.text:
                yield BlockText(piece.text)

    def end(self) -> Iterator[Step]:
        if self._open == "thinking":
            yield BlockSignature()
        if self._open is not None:
            yield BlockStop()
            self._open = None

    def _begin(self, kind: Kind, head: dict[str, Any]) -> Iterator[Step]:
        yield from self.end()
        self._open = kind
        yield BlockStart(kind, head)


def whole_blocks(steps: Iterable[Step]) -> list[dict[str, Any]]:
    """The content of a message, from all its steps."""
    blocks: list[dict[str, Any]] = []
    texts: list[str] = []
    for step in steps:
        if isinstance(step, BlockStart):
            blocks.append({"type": step.kind} | step.head)
            texts = []
        elif isinstance(step, BlockText):
            texts.append(step.text)
        elif isinstance(step, BlockSignature):
            blocks[-1] |= {"thinking": "".join(texts), "signature": SIGNATURE}
        elif blocks[-1]["type"] == "tool_use":
            blocks[-1]["input"] = _arguments("".join(texts))
        elif blocks[-1]["type"] == "text":
            blocks[-1]["text"] = "".join(texts)
    return blocks


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments; of a truncated call the complete part, as clients parse it from a stream."""
    try:
        arguments = from_json(text, allow_partial=True)
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}


@dataclass(kw_only=True)
class MessageWriter:
    """Writes one message: convert each fragment with `steps`, then write them as a whole or as events."""

    message_id: str
    model: str
    tokens: TokenCount
    ends_with_context: bool  # the context is full when the message has its maximum number of tokens
    omits_thinking: bool = False
    _reader: BlockReader = field(init=False)
    _num_blocks: int = 0
    _kind: str = ""  # of the open block
    _stop_reason: str | None = None
    _stop_sequence: str | None = None
    _violation: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._reader = BlockReader(omits_thinking=self.omits_thinking)

    def steps(self, fragment: Fragment, delta: Delta) -> list[Step]:
        """The steps of a fragment, which was read from `delta`."""
        steps = list(self._reader.read(fragment))
        if fragment.finish_reason is not None:
            steps += self._reader.end()
            self._note_end(fragment.finish_reason, delta)
            if fragment.schema_violation is not None:
                self._violation = {"schema_violation": fragment.schema_violation}
        return steps

    def _note_end(self, finish_reason: str, delta: Delta) -> None:
        self._stop_reason = _STOP_REASONS[finish_reason]
        if isinstance(delta.stop_reason, str):
            self._stop_reason, self._stop_sequence = "stop_sequence", delta.stop_reason
        elif finish_reason == "length" and self.ends_with_context:
            self._stop_reason = "model_context_window_exceeded"

    def message(self, content: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": self._stop_reason,
            "stop_sequence": self._stop_sequence,
            "usage": self._usage(),
            **self._violation,
        }

    def begin(self) -> bytes:
        return message_event({"type": "message_start", "message": self.message([])})

    def events(self, steps: Iterable[Step]) -> bytes:
        return b"".join([message_event(self._event(step)) for step in steps])

    def end(self) -> bytes:
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence, **self._violation}
        last = message_event({"type": "message_delta", "delta": delta, "usage": self._usage()})
        return last + message_event({"type": "message_stop"})

    def _event(self, step: Step) -> dict[str, Any]:
        if isinstance(step, BlockStart):
            self._num_blocks += 1
            self._kind = step.kind
            block = {"type": step.kind} | step.head | _EMPTY[step.kind]
            return {"type": "content_block_start", "index": self._num_blocks - 1, "content_block": block}
        if isinstance(step, BlockText):
            kind, name = _DELTAS[self._kind]
            delta = {"type": kind, name: step.text}
            return {"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta}
        if isinstance(step, BlockSignature):
            delta = {"type": "signature_delta", "signature": SIGNATURE}
            return {"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta}
        return {"type": "content_block_stop", "index": self._num_blocks - 1}

    def _usage(self) -> dict[str, Any]:
        """As in Anthropic's API, `input_tokens` excludes cached tokens."""
        tokens = self.tokens
        usage: dict[str, Any] = {
            "input_tokens": tokens.prompt - tokens.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": tokens.cached,
            "output_tokens": tokens.completion,
        }
        if tokens.reasoning is not None:
            usage["output_tokens_details"] = {"thinking_tokens": tokens.reasoning}
        return usage | {"evicted_tokens": tokens.evicted} if tokens.evicted else usage


def message_event(content: dict[str, Any]) -> bytes:
    """A server-sent event, named after the type of its data."""
    return f"event: {content['type']}\ndata: ".encode() + encode_json(content) + b"\n\n"


def message_ping() -> ServerSentEvent:
    return ServerSentEvent('{"type":"ping"}', event="ping", sep="\n")
