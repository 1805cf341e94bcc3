"""Messages of Anthropic's API: however an answer is cut into deltas, its events say what the whole message says."""

import itertools
import json
from typing import Any

import pytest
from anthropic import NOT_GIVEN
from anthropic.lib.streaming import MessageStream
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from stellarbyte_server.api.answers.choices import ChoiceForm, ChoiceReader
from stellarbyte_server.api.answers.messages import SIGNATURE, MessageWriter, message_ping, whole_blocks
from stellarbyte_server.api.answers.tool_parser import ToolCallParser
from stellarbyte_server.api.contract.message_objects import AssistantMessage, MessageEvent
from stellarbyte_server.api.structured.tool_formats import HERMES
from stellarbyte_server.observe.record import TokenCount
from stellarbyte_server.protocol.messages import Delta
from tests.support.tools.offered import by_name

TOOLS = by_name({"type": "function", "function": {"name": "f"}})
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
CALL = '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>'


def deltas(parts: list[str], *, thoughts: tuple[str, ...] = (), **last: Any) -> list[Delta]:
    made = [
        Delta(request_id="r", text="", reasoning=thought, num_tokens=1, num_reasoning_tokens=1) for thought in thoughts
    ]
    made += [Delta(request_id="r", text=part, num_tokens=1) for part in parts]
    return [*made, Delta(request_id="r", text="", num_tokens=1, **{"finish_reason": "stop", "cached_tokens": 2} | last)]


def writer(tokens: TokenCount, **more: Any) -> MessageWriter:
    return MessageWriter(message_id="msg_1", model="m", tokens=tokens, **{"ends_with_context": False} | more)


def reader() -> ChoiceReader:
    form = ChoiceForm(kind="chat", with_tools=True)
    return ChoiceReader(form, None, ToolCallParser(HERMES, TOOLS))  # type: ignore[arg-type]


def whole(parts: list[str], more: Any = None, **last: Any) -> dict[str, Any]:
    tokens = TokenCount(5, reasoning=0 if "thoughts" in last else None)
    writing, reading = writer(tokens, **more or {}), reader()
    steps = []
    for delta in deltas(parts, **last):
        tokens.add(delta, first_of_prompt=True)
        steps += writing.steps(reading.read(delta), delta)
    message = writing.message(whole_blocks(steps))
    AssistantMessage.model_validate_json(json.dumps(message))
    return message


def streamed(parts: list[str], more: Any = None, **last: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events, and the message that the official client makes of them."""
    tokens = TokenCount(5, reasoning=0 if "thoughts" in last else None)
    writing, reading = writer(tokens, **more or {}), reader()
    text = writing.begin()
    for delta in deltas(parts, **last):
        tokens.add(delta, first_of_prompt=True)
        text += writing.events(writing.steps(reading.read(delta), delta))
    text += writing.end()
    lines = text.decode().removesuffix("\n\n").split("\n\n")
    events = [json.loads(line.partition("\ndata: ")[2]) for line in lines]
    assert [line.partition("\n")[0] for line in lines] == [f"event: {event['type']}" for event in events]
    for event in events:
        MessageEvent.model_validate_json(json.dumps(event))
    raw: Any = map(EVENT.validate_python, events)  # the client's own reading of a stream
    stream = MessageStream(raw, NOT_GIVEN)
    stream.until_done()
    return events, stream.current_message_snapshot.to_dict()


def without_ids(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in block.items() if name != "id"} for block in content]


def check_order(events: list[dict[str, Any]]) -> None:
    """Blocks are numbered, and one at most is open."""
    assert events[0]["type"] == "message_start"
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    index, is_open = -1, False
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert not is_open
            index, is_open = index + 1, True
        assert is_open and event["index"] == index
        if event["type"] == "content_block_stop":
            is_open = False
    assert not is_open


ANSWERS = st.lists(
    st.sampled_from(["Hello", " ", "\n", "é漢", "<tool", CALL % "{}", CALL % '{"x": [1, "a\\n"]}', CALL[:30], "{"]),
    max_size=6,
).map("".join)


@settings(deadline=None, max_examples=100)
@given(text=ANSWERS, cuts=st.lists(st.integers(0, 200), max_size=12))
def test_however_an_answer_is_cut_its_events_say_what_the_message_says(text: str, cuts: list[int]) -> None:
    places = [0, *sorted({min(cut, len(text)) for cut in cuts}), len(text)]
    parts = [text[start:end] for start, end in itertools.pairwise(places)]
    message = whole([text])
    assert without_ids(whole(parts)["content"]) == without_ids(message["content"])
    events, made = streamed(parts)
    check_order(events)
    assert without_ids(made["content"]) == without_ids(message["content"])
    assert (made["stop_reason"], made["usage"]) == (message["stop_reason"], whole(parts)["usage"])


def test_a_call_has_an_id_of_anthropics_kind_and_its_input() -> None:
    message = whole(["Now:\n", CALL % '{"x": 1}'])
    first, call = message["content"]
    assert first == {"type": "text", "text": "Now:"}
    assert call["id"].startswith("toolu_") and call | {"id": ""} == {
        "type": "tool_use",
        "id": "",
        "name": "f",
        "input": {"x": 1},
    }
    assert message["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"x": 1, "y": "half a te', {"x": 1}),
        ('{"x": 1, "y', {"x": 1}),
        ("{", {}),
        ('{"x": [1, 2', {"x": [1, 2]}),
    ],
)
def test_a_call_that_is_cut_off_has_what_there_is_of_its_input(text: str, expected: dict[str, Any]) -> None:
    parts = [CALL.partition("%")[0] + text]
    message = whole(parts, finish_reason="length")
    assert message["content"][0]["input"] == expected and message["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(
    ("last", "more", "expected"),
    [
        ({}, {}, ("end_turn", None)),
        ({"stop_reason": "END"}, {}, ("stop_sequence", "END")),
        ({"stop_reason": 7}, {}, ("end_turn", None)),
        ({"finish_reason": "length"}, {}, ("max_tokens", None)),
        ({"finish_reason": "length"}, {"ends_with_context": True}, ("model_context_window_exceeded", None)),
        ({}, {"ends_with_context": True}, ("end_turn", None)),
    ],
)
def test_a_message_tells_why_it_ended(last: dict[str, Any], more: dict[str, Any], expected: tuple[Any, Any]) -> None:
    message = whole(["Hi"], more, **last)
    assert (message["stop_reason"], message["stop_sequence"]) == expected


@pytest.mark.parametrize("omits", [False, True])
@pytest.mark.parametrize("parts", [["Hi"], ["Now: ", CALL % '{"x": 1}'], [CALL % "{}"]])
def test_thinking_is_a_block_before_the_others(parts: list[str], omits: bool) -> None:
    more, thoughts = {"omits_thinking": omits}, ("Hm, ", CALL % "{}", ".")
    message = whole(parts, more, thoughts=thoughts)
    block = {"type": "thinking", "thinking": "" if omits else "".join(thoughts), "signature": SIGNATURE}
    assert message["content"] == [block, *message["content"][1:]]
    assert without_ids(message["content"][1:]) == without_ids(whole(parts)["content"])
    assert message["usage"]["output_tokens_details"] == {"thinking_tokens": 3}
    assert Message.model_validate(message).content[0].type == "thinking"
    events, made = streamed(parts, more, thoughts=thoughts)
    check_order(events)
    assert without_ids(made["content"]) == without_ids(message["content"])
    assert made["usage"] == message["usage"]
    kinds = [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"]
    num_thoughts = 0 if omits else 3
    assert kinds[: num_thoughts + 1] == ["thinking_delta"] * num_thoughts + ["signature_delta"]


def test_an_answer_that_is_cut_in_its_thinking_is_nothing_else() -> None:
    message = whole([], thoughts=("Hm",), finish_reason="length")
    assert message["content"] == [{"type": "thinking", "thinking": "Hm", "signature": SIGNATURE}]
    assert message["stop_reason"] == "max_tokens"
    events, made = streamed([], thoughts=("Hm",), finish_reason="length")
    check_order(events)
    assert made["content"] == message["content"]


def test_usage_divides_the_prompt_into_what_was_cached_and_what_was_not() -> None:
    assert whole(["a", "b"])["usage"] == {
        "input_tokens": 3,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 2,
        "output_tokens": 3,
    }
    assert whole(["a"], evicted_tokens=9)["usage"]["evicted_tokens"] == 9
    assert streamed(["a"])[0][0]["message"]["usage"]["input_tokens"] == 5


def test_an_answer_of_nothing_has_no_blocks() -> None:
    assert whole([])["content"] == []
    assert [event["type"] for event in streamed([])[0]] == ["message_start", "message_delta", "message_stop"]


def test_a_ping_is_an_event_of_its_own() -> None:
    assert message_ping().encode() == b'event: ping\ndata: {"type":"ping"}\n\n'
