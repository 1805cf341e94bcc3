"""Output items of a response. They grow as the answer arrives, and return an event for each change.

An event is a dict with its type; the response numbers and encodes it.
"""

from collections.abc import Sequence
from typing import Any, Literal

Event = dict[str, Any]
Status = Literal["in_progress", "completed", "incomplete"]


class TextItem:
    """A message of the assistant with one part of text."""

    def __init__(self, response_id: str, index: int) -> None:
        self._place = {"item_id": f"msg_{response_id}_{index}", "output_index": index, "content_index": 0}
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self.status: Status = "in_progress"

    def begin(self) -> list[Event]:
        index, item = self._place["output_index"], self.shown() | {"content": []}
        return [
            {"type": "response.output_item.added", "output_index": index, "item": item},
            {"type": "response.content_part.added", **self._place, "part": _part("", [])},
        ]

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> Event:
        self._texts.append(text)
        self._logprobs += logprobs
        return {"type": "response.output_text.delta", **self._place, "delta": text, "logprobs": logprobs}

    def end(self, status: Status) -> list[Event]:
        self.status = status
        item = self.shown()
        (part,) = item["content"]
        return [
            {
                "type": "response.output_text.done",
                **self._place,
                "text": part["text"],
                "logprobs": part["logprobs"],
            },
            {"type": "response.content_part.done", **self._place, "part": part},
            {"type": "response.output_item.done", "output_index": self._place["output_index"], "item": item},
        ]

    def shown(self) -> dict[str, Any]:
        return {
            "id": self._place["item_id"],
            "type": "message",
            "status": self.status,
            "role": "assistant",
            "content": [_part("".join(self._texts), self._logprobs)],
        }


class ReasoningItem:
    """The text of the reasoning."""

    def __init__(self, response_id: str, index: int) -> None:
        self._place = {"item_id": f"rs_{response_id}_{index}", "output_index": index, "content_index": 0}
        self._texts: list[str] = []
        self.status: Status = "in_progress"

    def begin(self) -> list[Event]:
        index, item = self._place["output_index"], self.shown() | {"content": []}
        return [
            {"type": "response.output_item.added", "output_index": index, "item": item},
            {"type": "response.content_part.added", **self._place, "part": _reasoning_part("")},
        ]

    def add(self, text: str) -> Event:
        self._texts.append(text)
        return {"type": "response.reasoning_text.delta", **self._place, "delta": text}

    def end(self, status: Status) -> list[Event]:
        self.status = status
        item = self.shown()
        (part,) = item["content"]
        return [
            {"type": "response.reasoning_text.done", **self._place, "text": part["text"]},
            {"type": "response.content_part.done", **self._place, "part": part},
            {"type": "response.output_item.done", "output_index": self._place["output_index"], "item": item},
        ]

    def shown(self) -> dict[str, Any]:
        return {
            "id": self._place["item_id"],
            "type": "reasoning",
            "status": self.status,
            "summary": [],
            "content": [_reasoning_part("".join(self._texts))],
        }


class CallItem:
    """A call of a function."""

    def __init__(self, response_id: str, index: int, name: str, call_id: str) -> None:
        self._place = {"item_id": f"fc_{response_id}_{index}", "output_index": index}
        self._name = name
        self._call_id = call_id
        self._arguments: list[str] = []
        self.status: Status = "in_progress"

    def begin(self) -> list[Event]:
        return [
            {
                "type": "response.output_item.added",
                "output_index": self._place["output_index"],
                "item": self.shown(),
            }
        ]

    def add(self, text: str) -> Event:
        self._arguments.append(text)
        return {"type": "response.function_call_arguments.delta", **self._place, "delta": text}

    def end(self, status: Status) -> list[Event]:
        self.status = status
        item = self.shown()
        return [
            {
                "type": "response.function_call_arguments.done",
                **self._place,
                "name": self._name,
                "arguments": item["arguments"],
            },
            {"type": "response.output_item.done", "output_index": self._place["output_index"], "item": item},
        ]

    def shown(self) -> dict[str, Any]:
        return {
            "id": self._place["item_id"],
            "type": "function_call",
            "status": self.status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self._arguments),
        }


def _part(text: str, logprobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _reasoning_part(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}
