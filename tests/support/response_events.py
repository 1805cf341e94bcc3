"""Streamed responses, checked against the types of the official openai client and against their own order."""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, get_args

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel

Event = dict[str, Any]
_ADDED_SINCE = {"name"}  # of function_call_arguments.done, in OpenAI's reference and its client for Node


def event_types() -> dict[str, type[BaseModel]]:
    """The client's class of each type of event."""
    (union, *_) = get_args(ResponseStreamEvent)
    return {get_args(event.model_fields["type"].annotation)[0]: event for event in get_args(union)}


EVENT_TYPES = event_types()


def events_of(text: str) -> list[Event]:
    """The events of a stream, whose names are their types."""
    events = []
    for block in text.split("\n\n")[:-1]:
        lines = [line for line in block.splitlines() if not line.startswith(":")]
        if lines:
            name, data = lines
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
    return events


def checked(events: Sequence[Event]) -> Event:
    """The response that the events end with, which says the same as they do together."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        kind = EVENT_TYPES[event["type"]]
        kind.model_validate(event)
        names = {field.alias or name for name, field in kind.model_fields.items()}
        assert event.keys() <= names | _ADDED_SINCE, event
    first, second, *told, last = events
    assert [first["type"], second["type"]] == ["response.created", "response.in_progress"]
    assert first["response"]["status"] == second["response"]["status"] == "in_progress"
    response: Event = last["response"]
    assert last["type"] == f"response.{response['status']}"
    Response.model_validate(response)
    assert list(_items(told)) == response["output"]
    ids = [item["id"] for item in response["output"]]
    assert len({*ids}) == len(ids)
    return response


def _items(events: Sequence[Event]) -> Iterator[Event]:
    """The items that the events tell of, one after the other, each begun, filled and ended."""
    starts = [i for i, event in enumerate(events) if event["type"] == "response.output_item.added"]
    assert starts and starts[0] == 0
    for index, (start, end) in enumerate(pairwise([*starts, len(events)])):
        added, *filling, done = events[start:end]
        assert done["type"] == "response.output_item.done"
        item: Event = done["item"]
        assert {event["output_index"] for event in events[start:end]} == {index}
        assert {event["item_id"] for event in filling} == {item["id"]} == {added["item"]["id"]}
        assert added["item"]["status"] == "in_progress"
        _CHECKS[item["type"]](added["item"], filling, item)
        yield item


def _check_text(begun: Event, filling: Sequence[Event], item: Event) -> None:
    part_added, *deltas, text_done, part_done = filling
    (part,) = item["content"]
    assert begun["content"] == [] and part_added["type"] == "response.content_part.added"
    assert {delta["type"] for delta in deltas} <= {"response.output_text.delta"}
    assert "".join(delta["delta"] for delta in deltas) == text_done["text"] == part["text"]
    assert [entry for delta in deltas for entry in delta["logprobs"]] == text_done["logprobs"] == part["logprobs"]
    assert text_done["type"] == "response.output_text.done"
    assert part_done["type"] == "response.content_part.done" and part_done["part"] == part


def _check_call(begun: Event, filling: Sequence[Event], item: Event) -> None:
    *deltas, done = filling
    assert begun == item | {"arguments": "", "status": "in_progress"}
    assert {delta["type"] for delta in deltas} <= {"response.function_call_arguments.delta"}
    assert "".join(delta["delta"] for delta in deltas) == done["arguments"] == item["arguments"]
    assert done["type"] == "response.function_call_arguments.done" and done["name"] == item["name"]


def _check_reasoning(begun: Event, filling: Sequence[Event], item: Event) -> None:
    part_added, *deltas, text_done, part_done = filling
    (part,) = item["content"]
    assert begun["content"] == [] == item["summary"] and part_added["type"] == "response.content_part.added"
    assert part_added["part"] == {"type": "reasoning_text", "text": ""}
    assert {delta["type"] for delta in deltas} == {"response.reasoning_text.delta"}
    assert "".join(delta["delta"] for delta in deltas) == text_done["text"] == part["text"]
    assert text_done["type"] == "response.reasoning_text.done"
    assert part_done["type"] == "response.content_part.done" and part_done["part"] == part


_CHECKS = {"message": _check_text, "function_call": _check_call, "reasoning": _check_reasoning}
