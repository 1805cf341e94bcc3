"""The official openai client against the demo model: answers in JSON, tool calls, and /v1/responses.

The model is small, so what it says is not looked at, only that it is what was asked for.
"""

import json
from typing import Literal

import jsonschema
import openai
import pydantic
import pytest

from tests.support.cases import some
from tests.support.clients.openai_client import QUESTION, chat, strict_client
from tests.support.models.references import MODEL_NAME

WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]


class Capital(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    city: Literal["Paris", "London", "Berlin"]
    on_the_sea: bool
    districts: int = pydantic.Field(ge=1, le=99)


def tool(name: str, **properties):
    parameters = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {
        "type": "function",
        "function": {"name": name, "description": f"{name} of a city", "parameters": parameters},
    }


CITY = {"enum": ["Paris", "London"]}
TOOLS = [
    tool("get_weather", city=CITY),
    tool("get_time", city=CITY, hours={"type": "integer", "minimum": 0, "maximum": 9}),
]


@pytest.fixture(scope="module")
def client(demo_server):
    with strict_client(demo_server.url) as client:
        yield client


def respond(client, question=QUESTION[0]["content"], **fields):
    fields = {"temperature": 0, "max_output_tokens": 12} | fields
    return client.responses.create(model=MODEL_NAME, input=question, **fields)


def check_calls(calls) -> None:
    """Each is one of TOOLS, with arguments as its schema wants them, and has an id of its own."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
    assert len({call.id for call in calls}) == len(calls)


# Answers in JSON


def test_json_object_answers_with_an_object(client) -> None:
    ask = [{"role": "user", "content": "Answer in JSON: what is the capital of France?"}]
    choice = chat(client, ask, response_format={"type": "json_object"}).choices[0]
    assert choice.finish_reason == "stop"
    assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize("temperature", [0, 2])
def test_an_answer_follows_its_schema_however_wild_the_sampling(client, temperature) -> None:
    wanted = {"name": "capital", "schema": Capital.model_json_schema(), "strict": True}
    answer = chat(
        client, response_format={"type": "json_schema", "json_schema": wanted}, temperature=temperature, seed=1, n=2
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        Capital.model_validate_json(choice.message.content, strict=True)


def test_a_streamed_answer_follows_its_schema(client) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "capital", "schema": Capital.model_json_schema()}}
    parts = [chunk.choices[0].delta.content or "" for chunk in chat(client, response_format=form, stream=True)]
    assert len(parts) > 3
    assert "".join(parts) == chat(client, response_format=form).choices[0].message.content
    Capital.model_validate_json("".join(parts))


def test_the_client_parses_answers_into_models(client) -> None:
    ask = {"model": MODEL_NAME, "temperature": 0}
    chatted = client.chat.completions.parse(**ask, messages=QUESTION, max_tokens=60, response_format=Capital)
    assert isinstance(chatted.choices[0].message.parsed, Capital)
    with client.chat.completions.stream(**ask, messages=QUESTION, max_tokens=60, response_format=Capital) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.parsed == chatted.choices[0].message.parsed
    responded = client.responses.parse(**ask, input=QUESTION[0]["content"], max_output_tokens=60, text_format=Capital)
    assert responded.output_parsed == chatted.choices[0].message.parsed


def test_an_answer_cut_off_by_max_tokens_says_so(client) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model=MODEL_NAME, messages=QUESTION, temperature=0, max_tokens=3, response_format=Capital
        )


# Tool calls


def test_a_tool_call_makes_the_round_trip(client) -> None:
    asked = chat(client, WEATHER, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    choice = asked.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    check_calls([call])
    told = [*WEATHER, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "18 degrees and sunny"}]
    answer = chat(client, told, tools=TOOLS, tool_choice="none", max_tokens=16)
    assert answer.choices[0].message.content and answer.choices[0].message.tool_calls is None
    assert answer.usage.prompt_tokens > chat(client, WEATHER, max_tokens=1).usage.prompt_tokens


@pytest.mark.parametrize("name", ["get_weather", "get_time"])
def test_a_named_tool_is_called_once(client, name) -> None:
    choice = {"type": "function", "function": {"name": name}}
    (answer,) = chat(client, WEATHER, tools=TOOLS, tool_choice=choice).choices
    assert answer.finish_reason == "tool_calls"
    assert [call.function.name for call in answer.message.tool_calls] == [name]
    check_calls(answer.message.tool_calls)


def called_before() -> list[dict]:
    """A conversation in which the same was asked and called several times, so that the model does it again."""
    messages = []
    for i, city in enumerate(("London", "Paris", "London")):
        function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
        messages += [
            {"role": "user", "content": f"What is the weather in {city}?"},
            {"role": "assistant", "tool_calls": [{"id": f"call_{i}", "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": f"call_{i}", "content": "sunny"},
        ]
    return messages + WEATHER


@pytest.mark.parametrize("seed", some([0, 1], 0))
@pytest.mark.parametrize(
    ("messages", "calls_a_tool"), [(WEATHER, False), (called_before(), True)], ids=["text", "call"]
)
def test_auto_answers_with_text_or_calls_that_are_right_whole_and_streamed(
    client, messages, calls_a_tool, seed
) -> None:
    ask = {"tools": TOOLS, "tool_choice": "auto", "temperature": 1, "seed": seed}
    whole = chat(client, messages, **ask).choices[0]
    deltas = [chunk.choices[0].delta for chunk in chat(client, messages, **ask, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == (whole.message.content or "")
    calls = whole.message.tool_calls or []
    parts = [call for delta in deltas for call in delta.tool_calls or []]
    assert [call.function.name for call in parts if call.id] == [call.function.name for call in calls]
    for i, call in enumerate(calls):
        streamed = "".join(part.function.arguments or "" for part in parts if part.index == i)
        assert streamed == call.function.arguments
    check_calls(calls)
    assert (whole.finish_reason == "tool_calls") == bool(calls) == calls_a_tool
    assert bool(whole.message.content) != calls_a_tool


def test_several_calls_fit_in_one_answer(client) -> None:
    """min_tokens forbids the end of the answer, so another call has to follow the first."""
    ask = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 100, "extra_body": {"min_tokens": 45}}
    calls = chat(client, WEATHER, **ask).choices[0].message.tool_calls
    assert len(calls) > 1
    check_calls(calls[:-1])  # the last one may be cut off


def test_streamed_tool_calls_are_those_of_the_whole_answer(client) -> None:
    steps = {"speculative": False}  # each token in a step of its own, and so in an event of its own
    ask = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": 1, "extra_body": steps}
    (whole,) = chat(client, WEATHER, **ask).choices[0].message.tool_calls
    chunks = list(chat(client, WEATHER, **ask, stream=True))
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or []]
    assert {delta.index for delta in deltas} == {0}
    assert deltas[0].id and deltas[0].function.name == whole.function.name
    assert all(delta.id is None for delta in deltas[1:])
    assert len(deltas) > 2, "arguments come as they are written"
    assert "".join(delta.function.arguments or "" for delta in deltas) == whole.function.arguments
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("helper", ["stream", "parse"])
def test_an_answer_as_the_clients_helpers_return_it_can_be_sent_back(client, helper) -> None:
    wanted = openai.pydantic_function_tool(Capital, name="tell_capital")
    ask = {"model": MODEL_NAME, "temperature": 0, "max_tokens": 60, "tools": [wanted]}
    ask |= {"tool_choice": {"type": "function", "function": {"name": "tell_capital"}}}
    if helper == "parse":
        answer = client.chat.completions.parse(messages=QUESTION, **ask)
    else:
        with client.chat.completions.stream(messages=QUESTION, **ask) as stream:
            answer = stream.get_final_completion()
    message = answer.choices[0].message
    (call,) = message.tool_calls
    told = [*QUESTION, message, {"role": "tool", "tool_call_id": call.id, "content": "Right."}]
    (again,) = client.chat.completions.parse(messages=told, **ask).choices
    assert isinstance(again.message.tool_calls[0].function.parsed_arguments, Capital)


def test_arguments_that_were_cut_off_can_be_sent_back(client) -> None:
    cut = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Par'}}
    told = [*WEATHER, {"role": "assistant", "tool_calls": [cut]}, {"role": "tool", "tool_call_id": "c", "content": "?"}]
    assert chat(client, told, tools=TOOLS, tool_choice="none", max_tokens=4).choices[0].message.content


def test_the_client_parses_the_arguments_of_a_call(client) -> None:
    wanted = openai.pydantic_function_tool(Capital, name="tell_capital")
    answer = client.chat.completions.parse(
        model=MODEL_NAME,
        messages=QUESTION,
        temperature=0,
        max_tokens=60,
        tools=[wanted],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Capital)


# Responses


def test_a_response_is_the_answer_of_a_chat(client) -> None:
    response = respond(client)
    assert "Paris" in response.output_text
    assert response.output_text == chat(client, max_tokens=12).choices[0].message.content
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    cut = respond(client, max_output_tokens=2)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_instructions_and_earlier_answers_are_part_of_the_conversation(client) -> None:
    instructions = "Answer in French."
    first = respond(client, instructions=instructions)
    system = {"role": "system", "content": instructions}
    assert first.output_text == chat(client, [system, *QUESTION], max_tokens=12).choices[0].message.content
    again = [*QUESTION, *(item.to_dict() for item in first.output), {"role": "user", "content": "And of Spain?"}]
    said = [
        *QUESTION,
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And of Spain?"},
    ]
    assert respond(client, again).output_text == chat(client, said, max_tokens=12).choices[0].message.content


def test_a_streamed_response_tells_its_story_in_order(client) -> None:
    events = list(respond(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(event.type for event in events))
    end = "response.completed" if events[-1].response.status == "completed" else "response.incomplete"
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        end,
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == respond(client).output_text


def test_the_clients_own_stream_reader_puts_a_response_together(client) -> None:
    with client.responses.stream(
        model=MODEL_NAME, input="Which city?", temperature=0, max_output_tokens=60, text_format=Capital
    ) as stream:
        stream.until_done()
        response = stream.get_final_response()
    assert isinstance(response.output_parsed, Capital)


def test_a_responses_logprobs_are_given_on_request(client) -> None:
    response = respond(client, include=["message.output_text.logprobs"], top_logprobs=2)
    (part,) = response.output[0].content
    assert b"".join(bytes(token.bytes) for token in part.logprobs).decode() == response.output_text
    assert {len(token.top_logprobs) for token in part.logprobs} == {2}


def test_responses_are_not_stored(client) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        respond(client, previous_response_id=respond(client).id)
    assert error.value.param == "previous_response_id"
