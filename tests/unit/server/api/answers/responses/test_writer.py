"""A response has an item for each stretch of text and each call, however its answer is cut, streamed or not."""

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest

from stellarbyte_server.api.answers.choices import ChoiceForm, ChoiceReader
from stellarbyte_server.api.answers.responses.fields import response_fields
from stellarbyte_server.api.answers.responses.writer import ResponseWriter
from stellarbyte_server.api.answers.tool_parser import ToolCallParser
from stellarbyte_server.api.contract.bodies.responses.body import ResponsesBody
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.contract.response_objects import Response, ResponseEvent
from stellarbyte_server.api.structured.tool_formats import HERMES
from stellarbyte_server.observe.record import TokenCount
from stellarbyte_server.protocol.messages import Delta, TokenLogprob
from stellarbyte_server.protocol.request import GenerationRequest, SamplingParams
from tests.support.response_events import checked, events_of
from tests.support.tools.offered import by_name


def call(**arguments: Any) -> str:
    return "\n<tool_call>\n" + json.dumps({"name": "look", "arguments": arguments}) + "\n</tool_call>"


TEXT = f"Let me see: <tool>{call(city='Paris')}{call(city='Rom', more=[{}])} And then.{call()}"
ITEMS = [
    ("message", "Let me see: <tool>"),
    ("function_call", '{"city": "Paris"}'),
    ("function_call", '{"city": "Rom", "more": [{}]}'),
    ("message", " And then."),
    ("function_call", "{}"),
]
TOOLS = by_name({"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}})
BYTES = [bytes([value]) for value in range(256)]


def writer() -> ResponseWriter:
    body = ResponsesBody(model="m", input="hi", tool_choice="auto")
    request = GenerationRequest(
        request_id="r", prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=9, seed=0), context_overflow="error"
    )
    return ResponseWriter("r", response_fields(body, request), TokenCount(1))


def cut(text: str, chance: random.Random, reason: str, *, logprobs: bool = False) -> Iterator[Delta]:
    """The deltas of an answer of one token for each byte, in parts of any length."""
    start = 0
    while start < len(text):
        end = min(len(text), start + chance.choice([1, 1, 2, 3, 20]))
        tokens = [TokenLogprob(ord(character), -1.0, ()) for character in text[start:end]] if logprobs else []
        yield Delta(
            request_id="r",
            text=text[start:end],
            num_tokens=end - start,
            logprobs=tokens,
            offsets=[*range(start, end)] if logprobs else [],
            finish_reason=reason if end == len(text) else None,
        )
        start = end
    if not text:
        yield Delta(request_id="r", text="", num_tokens=0, finish_reason=reason)


def answered(deltas: Sequence[Delta], *, tools: bool = True, logprobs: bool = False) -> tuple[dict[str, Any], str]:
    """The response, and the text of its stream."""
    form = ChoiceForm(kind="chat", with_tools=tools, logprobs=0 if logprobs else None)
    reader = ChoiceReader(form, BYTES, ToolCallParser(HERMES, TOOLS) if tools else None)
    response = writer()
    stream = [response.encoded(response.begin())]
    stream += [response.encoded(response.add(reader.read(delta))) for delta in deltas]
    stream.append(response.encoded(response.end()))
    return response.response(), b"".join(stream).decode()


def thinking(thought: str, text: str, chance: random.Random, reason: str = "stop") -> list[Delta]:
    """The deltas of an answer after its reasoning, the end of which one delta may share with the answer's start."""
    before, after = [*cut(thought, chance, "")], [*cut(text, chance, reason)]
    deltas = [
        Delta(request_id="r", text="", reasoning=delta.text, num_reasoning_tokens=delta.num_tokens, num_tokens=0)
        for delta in before
    ]
    if text and chance.random() < 0.5:
        last = deltas.pop()
        shared = {"reasoning": last.reasoning, "num_reasoning_tokens": last.num_reasoning_tokens}
        after[0] = msgspec.structs.replace(after[0], **shared)
    elif not text:
        return [*deltas[:-1], msgspec.structs.replace(deltas[-1], finish_reason=reason)]
    return [*deltas, *after]


def said(response: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (item["type"], item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
        for item in response["output"]
    ]


@pytest.mark.parametrize("seed", range(30))
def test_items_come_in_the_order_of_the_text_however_it_is_cut(seed: int) -> None:
    response, stream = answered([*cut(TEXT, random.Random(seed), "stop")])
    assert said(response) == ITEMS
    events = events_of(stream)
    assert checked(events) == response
    for event in events:
        ResponseEvent.model_validate_json(json.dumps(event))
    Response.model_validate_json(json.dumps(response))
    assert {item["status"] for item in response["output"]} == {"completed"} == {response["status"]}
    calls = [item["call_id"] for item in response["output"] if item["type"] == "function_call"]
    assert len({*calls}) == 3
    assert response["completed_at"] >= response["created_at"]


@pytest.mark.parametrize("end", range(0, len(TEXT), 3))
def test_of_an_answer_that_is_cut_off_only_the_last_item_is_incomplete(end: int) -> None:
    response, stream = answered([*cut(TEXT[:end], random.Random(end), "length")])
    assert checked(events_of(stream)) == response
    assert (response["status"], response["completed_at"]) == ("incomplete", None)
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    statuses = [item["status"] for item in response["output"]]
    assert statuses == ["completed"] * (len(statuses) - 1) + ["incomplete"]


@pytest.mark.parametrize("tools", [True, False])
def test_an_empty_answer_is_an_empty_message(tools: bool) -> None:
    response, stream = answered([*cut("", random.Random(0), "stop")], tools=tools)
    assert checked(events_of(stream)) == response
    assert said(response) == [("message", "")]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    ("text", "tools", "shown"),
    [(TEXT, True, "Let me see: <tool>"), ("<tool_cal", True, "<tool_cal"), (" <tool_call> x", False, " <tool_call> x")],
)
def test_the_text_before_calls_has_its_log_probabilities(seed: int, text: str, tools: bool, shown: str) -> None:
    deltas = [*cut(text, random.Random(seed), "length", logprobs=True)]
    response, stream = answered(deltas, tools=tools, logprobs=True)
    assert checked(events_of(stream)) == response
    parts = [item["content"][0] for item in response["output"] if item["type"] == "message"]
    assert [entry["token"] for entry in parts[0]["logprobs"]] == [*shown]
    assert not any(part["logprobs"] for part in parts[1:])


@pytest.mark.parametrize(
    ("status", "code"),
    [(500, "server_error"), (503, "server_error"), (429, "rate_limit_exceeded"), (400, "invalid_prompt")],
)
def test_a_response_that_fails_ends_with_the_error_and_itself(status: int, code: str) -> None:
    response = writer()
    events = [*response.begin()]
    reader = ChoiceReader(ChoiceForm(kind="chat"), BYTES)
    events += response.add(reader.read(Delta(request_id="r", text="Hel", num_tokens=1)))
    events += response.fail(ApiError(status, "It failed.", param="tools", code=None))
    told = events_of(response.encoded(events).decode())
    assert [event["type"] for event in told[-2:]] == ["error", "response.failed"]
    assert (told[-2]["message"], told[-2]["param"]) == ("It failed.", "tools")
    failed = told[-1]["response"]
    assert failed["error"] == {"code": code, "message": "It failed."}
    assert (failed["output"][0]["status"], said(failed)) == ("incomplete", [("message", "Hel")])
    for event in told:
        ResponseEvent.model_validate_json(json.dumps(event))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("text", "tools"), [(TEXT, True), ("Yes.", False)])
def test_the_reasoning_is_an_item_before_the_others(seed: int, text: str, tools: bool) -> None:
    thought = f"Hm: {call(city='Bonn')}"
    response, stream = answered(thinking(thought, text, random.Random(seed)), tools=tools)
    events = events_of(stream)
    assert checked(events) == response
    assert said(response) == [("reasoning", thought), *(ITEMS if tools else [("message", "Yes.")])]
    for event in events:
        ResponseEvent.model_validate_json(json.dumps(event))
    Response.model_validate_json(json.dumps(response))
    assert {item["status"] for item in response["output"]} == {"completed"}
    assert response["output"][0]["id"].startswith("rs_")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tools", [True, False])
def test_an_answer_that_is_cut_in_its_reasoning_is_nothing_else(seed: int, tools: bool) -> None:
    response, stream = answered(thinking("Hm, wh", "", random.Random(seed), "length"), tools=tools)
    assert checked(events_of(stream)) == response
    assert said(response) == [("reasoning", "Hm, wh")]
    assert (response["status"], response["output"][0]["status"]) == ("incomplete", "incomplete")


@pytest.mark.parametrize("seed", range(5))
def test_log_probabilities_are_of_the_text_and_not_of_the_reasoning(seed: int) -> None:
    chance = random.Random(seed)
    thought = Delta(request_id="r", text="", reasoning="Hm", num_reasoning_tokens=2, num_tokens=2)
    response, _ = answered([thought, *cut(TEXT, chance, "stop", logprobs=True)], logprobs=True)
    parts = [item["content"][0] for item in response["output"] if item["type"] == "message"]
    assert [entry["token"] for entry in parts[0]["logprobs"]] == [*"Let me see: <tool>"]
