"""Tool calls in the format of chat completions: deltas of chunks, and complete calls."""

from collections.abc import Sequence
from typing import Any

from stellarbyte_server.api.answers.tool_parser import CallArguments, CallStart


class CallDeltas:
    """Makes the deltas of one choice."""

    def __init__(self) -> None:
        self._customs: set[int] = set()  # calls of custom tools

    def of(self, pieces: Sequence[CallStart | CallArguments]) -> list[dict[str, Any]]:
        """One delta per call, because clients expect each call at most once in a chunk."""
        deltas: dict[int, dict[str, Any]] = {}
        for piece in pieces:
            if isinstance(piece, CallStart) and piece.is_custom:
                self._customs.add(piece.index)
            kind, text = ("custom", "input") if piece.index in self._customs else ("function", "arguments")
            if isinstance(piece, CallStart):
                called = {"name": piece.name, text: ""}
                deltas[piece.index] = {"index": piece.index, "id": piece.id, "type": kind, kind: called}
            else:
                delta = deltas.setdefault(piece.index, {"index": piece.index, kind: {text: ""}})
                delta[kind][text] += piece.text
        return list(deltas.values())


def joined_calls(deltas: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join deltas into complete calls."""
    calls: dict[int, dict[str, Any]] = {}
    texts: dict[int, list[str]] = {}
    for delta in deltas:
        index = delta["index"]
        if "id" in delta:
            calls[index] = delta
        kind, text = ("custom", "input") if "custom" in delta else ("function", "arguments")
        texts.setdefault(index, []).append(delta[kind][text])
    return [_whole(call, "".join(texts[index])) for index, call in calls.items()]


def _whole(call: dict[str, Any], text: str) -> dict[str, Any]:
    kind = call["type"]
    called = {"name": call[kind]["name"], "input" if kind == "custom" else "arguments": text}
    return {"id": call["id"], "type": kind, kind: called}


def joined_function_call(deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join deltas into the complete call of the deprecated form."""
    return {"name": deltas[0]["name"], "arguments": "".join(delta["arguments"] for delta in deltas)}
