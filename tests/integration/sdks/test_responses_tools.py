"""Function tools on /v1/responses: calls, their results, events and errors.

The fake engine repeats its prompt, so there an answer holds the calls that were in it, written as a model would.
"""

import json
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response

from tests.support.clients.openai_client import strict_client
from tests.support.models.references import MODEL_NAME
from tests.support.over_http import assert_error
from tests.support.response_events import checked, events_of
from tests.support.servers.server_process import FAKE_MODEL

CITY = {"enum": ["Paris", "London"]}
PARAMETERS = {"type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False}
STRICT_FORMAT = {"type": "json_schema", "name": "a", "strict": True}
TOOL = {"type": "function", "name": "get_weather", "description": "The weather.", "parameters": PARAMETERS}
TIME = {"type": "function", "name": "get_time", "parameters": PARAMETERS, "strict": True}
CALL = {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c", "output": "18 °C"}
WEATHER = "What is the weather in Paris?"
WRITTEN = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


# The fake engine


def ask(server: Any, **fields: Any) -> httpx.Response:
    body = {"model": FAKE_MODEL, "input": "hi", "max_output_tokens": 4} | fields
    return httpx.post(f"{server.url}/v1/responses", json=body, timeout=30)


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    times = dict.fromkeys(("id", "created_at", "completed_at"))
    items = [item | {"id": None} | ({"call_id": None} if "call_id" in item else {}) for item in response["output"]]
    return response | times | {"output": items}


@pytest.mark.parametrize(
    ("max_tokens", "kinds"),
    [
        (60, ["message"]),  # not even the call's name and the start of its arguments
        (90, ["message", "function_call"]),
        (200, ["message", "function_call", "function_call", "message"]),
    ],
)
def test_text_and_calls_are_items_streamed_or_not(fake_server: Any, max_tokens: int, kinds: list[str]) -> None:
    unknown = WRITTEN.replace("get_weather", "get_mood")
    fields = {
        "instructions": f"Ask.\n{WRITTEN}\n{WRITTEN}\n{unknown}",
        "tools": [TOOL],
        "max_output_tokens": max_tokens,
    }
    whole = ask(fake_server, **fields).json()
    streamed = checked(events_of(ask(fake_server, **fields, stream=True).text))
    assert without_ids(streamed) == without_ids(whole)
    assert [item["type"] for item in whole["output"]] == kinds
    assert whole["output"][0]["content"][0]["text"].startswith("system\nAsk.")
    calls = [item for item in whole["output"] if item["type"] == "function_call"]
    assert all('{"city": "Paris"}'.startswith(call["arguments"]) for call in calls)
    assert [item["status"] for item in whole["output"]] == ["completed"] * (len(kinds) - 1) + ["incomplete"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"tools": [TOOL | {"parameters": {"type": "string"}}]}, "tools[0].parameters"),
        ({"tools": [TOOL | {"strict": True, "parameters": {"type": "object", "not": {}}}]}, "tools[0].parameters"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "get_time"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"instructions": "Ask.", "input": [RESULT]}, "input[0]"),
        ({"instructions": "Ask.", "input": [CALL, RESULT, RESULT]}, "input[2].call_id"),
        ({"input": [{"role": "user", "content": "hi"}, CALL, {"role": "user", "content": "hi"}]}, "input[1]"),
        ({"text": {"format": STRICT_FORMAT | {"schema": {"not": {}}}}}, "text.format"),
    ],
)
def test_errors_name_the_field_as_it_was_sent(fake_server: Any, fields: dict[str, Any], param: str) -> None:
    response = ask(fake_server, **fields)
    error = assert_error(response, 400, param)
    assert "messages" not in error["message"] and "function.parameters" not in error["message"]


def test_the_response_shows_what_was_asked_for(fake_server: Any) -> None:
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_time"}]}
    fields = {
        "tools": [TOOL, TIME],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tool_calls": 2,
        "presence_penalty": 0.5,
        "prompt_cache_key": "k",
        "reasoning": {"effort": "low", "summary": None},
        "safety_identifier": "s",
        "user": "u",
        "metadata": {"a": "b"},
    }
    response = ask(fake_server, **fields, service_tier="flex", store=True, include=["reasoning.encrypted_content"])
    assert response.headers["X-Ignored-Fields"] == "reasoning.effort"
    content = response.json()
    tools = [TOOL | {"strict": True}, TIME | {"description": None}]
    assert {name: content[name] for name in fields} == fields | {"tools": tools}
    assert (content["service_tier"], content["store"], content["background"]) == ("default", False, False)
    Response.model_validate(content)


# The demo model


class Weather(pydantic.BaseModel):
    """The weather in a city."""

    model_config = pydantic.ConfigDict(extra="forbid")

    city: Literal["Paris", "London"]


@pytest.fixture(scope="module")
def client(demo_server: Any) -> openai.OpenAI:
    return strict_client(demo_server.url)


FORCED = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}


def respond(client: openai.OpenAI, given: Any = WEATHER, **fields: Any) -> Any:
    fields = {"temperature": 0, "max_output_tokens": 60} | fields
    return client.responses.create(model=MODEL_NAME, input=given, **fields)


def test_a_call_and_its_result_make_an_answer(client: openai.OpenAI) -> None:
    """The second turn is the chat with the same call and the same result."""
    first = respond(client, **FORCED)
    (call,) = first.output
    assert (call.type, call.name, first.status) == ("function_call", "get_weather", "completed")
    Weather.model_validate_json(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "18 °C"}
    asked = {"role": "user", "content": WEATHER}
    answer = respond(client, [asked, *first.output, result], tools=[TOOL], tool_choice="none")
    function = {"name": call.name, "arguments": call.arguments}
    chat = client.chat.completions.create(
        model=MODEL_NAME,
        temperature=0,
        max_tokens=60,
        messages=[
            asked,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": call.call_id, "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": call.call_id, "content": "18 °C"},
        ],
    )
    assert answer.output_text == chat.choices[0].message.content != ""
    again = [asked, *first.output, result, *answer.output, {"role": "user", "content": "Thanks."}]
    assert respond(client, again, tools=[TOOL], tool_choice="none").output_text


def test_a_streamed_call_is_the_same_call(client: openai.OpenAI) -> None:
    events = [event.to_dict() for event in respond(client, stream=True, **FORCED)]
    (streamed,), (whole,) = checked(events)["output"], respond(client, **FORCED).output
    assert (streamed["name"], streamed["arguments"]) == (whole.name, whole.arguments)


def test_a_named_function_and_allowed_tools_are_the_only_ones_called(client: openai.OpenAI) -> None:
    named = {"type": "function", "name": "get_time"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [named]}
    for choice in (named, allowed):
        response = respond(client, tools=[TOOL, TIME], tool_choice=choice, parallel_tool_calls=False)
        assert {item.name for item in response.output if item.type == "function_call"} == {"get_time"}


def test_the_clients_own_helpers_read_calls_and_send_them_back(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Weather)["function"]
    fields = FORCED | {"tools": [{"type": "function", **tool}]}
    fields |= {"model": MODEL_NAME, "input": WEATHER, "temperature": 0, "max_output_tokens": 60}
    parsed = client.responses.parse(**fields)
    with client.responses.stream(**fields) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    for response in (parsed, streamed):
        (call,) = response.output
        assert isinstance(call.parsed_arguments, Weather | dict) and json.loads(call.arguments)["city"]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "18 °C"}
        asked = [{"role": "user", "content": WEATHER}, *response.output, result]
        assert client.responses.create(**fields | {"input": asked, "tool_choice": "none"}).output_text
