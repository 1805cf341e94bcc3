"""The official anthropic client against the demo model: messages whole and streamed, tools, tokens, errors.

The model is small, so what it says is not looked at, only that it is what was asked for.
"""

import asyncio
import json
from itertools import groupby
from typing import Any

import anthropic
import httpx
import jsonschema
import pydantic
import pytest

from stellarbyte_server.api.contract.message_objects import MessageEvent
from tests.support.clients.anthropic_client import (
    QUESTION,
    ask,
    fields,
    num_prompt_tokens,
    streamed,
    strict_client,
    told,
)
from tests.support.models.references import MODEL_NAME
from tests.support.servers.fake_engine import MAX_MODEL_LEN

CITY = {"enum": ["Paris", "London"]}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"name": name, "description": f"{name} of a city", "input_schema": schema}


TOOLS = [tool("get_weather", city=CITY), tool("get_time", city=CITY, hours={"type": "integer", "maximum": 9})]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def client(demo_server):
    with strict_client(demo_server.url) as client:
        yield client


def calls_of(message) -> list[Any]:
    """Each is one of TOOLS, with an input as its schema wants it, and has an id of its own."""
    calls = [block for block in message.content if block.type == "tool_use"]
    schemas = {tool["name"]: tool["input_schema"] for tool in TOOLS}
    for call in calls:
        jsonschema.validate(call.input, schemas[call.name])
    assert len({call.id for call in calls}) == len(calls)
    return calls


def events_of(url: str, **more: Any) -> list[dict[str, Any]]:
    """The stream's events as the API describes them, and named as their types."""
    body = fields(**more)
    body |= body.pop("extra_body") | {"stream": True}
    text = httpx.post(f"{url}/v1/messages", json=body, timeout=60).text
    events = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        MessageEvent.model_validate_json(data.removeprefix("data: "))
    return events


# Texts


def test_a_message_and_its_stream_say_the_same(client) -> None:
    whole = ask(client)
    assert whole.id.startswith("msg_") and whole.model == MODEL_NAME and whole._request_id
    assert [block.type for block in whole.content] == ["text"] and whole.content[0].text
    assert whole.stop_reason == "end_turn" and 0 < whole.usage.output_tokens < 24
    events, message = streamed(client)
    assert told(message) == told(whole)
    assert num_prompt_tokens(message) == num_prompt_tokens(whole)
    assert "".join(event.text for event in events if event.type == "text") == whole.content[0].text


def test_events_come_in_the_order_of_the_protocol(demo_server) -> None:
    for more in ({}, {"messages": WEATHER, "tools": TOOLS, "tool_choice": {"type": "any"}}):
        kinds = [kind for kind, _ in groupby(event["type"] for event in events_of(demo_server.url, **more))]
        assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
        blocks = kinds[1:-2]
        assert blocks and len(blocks) % 3 == 0
        assert blocks == ["content_block_start", "content_block_delta", "content_block_stop"] * (len(blocks) // 3)


def test_the_async_client_says_the_same_too(client, demo_server) -> None:
    async def asked() -> tuple[Any, Any]:
        async with anthropic.AsyncAnthropic(
            base_url=demo_server.url, api_key="unused", max_retries=0, _strict_response_validation=True
        ) as other:
            whole = await other.messages.create(**fields())
            async with other.messages.stream(**fields()) as stream:
                text = "".join([text async for text in stream.text_stream])
                assert text == (await stream.get_final_text())
                return whole, await stream.get_final_message()

    for message in asyncio.run(asked()):
        assert told(message) == told(ask(client))


def test_an_answer_ends_as_it_says(client) -> None:
    text = ask(client).content[0].text
    stop = text.split()[2]
    for stops in ([stop], ["no such text", stop]):
        stopped = ask(client, stop_sequences=stops)
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
        assert stopped.content[0].text == text.partition(stop)[0]
        assert told(streamed(client, stop_sequences=stops)[1]) == told(stopped)
    cut = ask(client, max_tokens=3)
    assert (cut.stop_reason, cut.stop_sequence, cut.usage.output_tokens) == ("max_tokens", None, 3)


def test_an_answer_that_fills_the_context_says_so(fake_server) -> None:
    with strict_client(fake_server.url) as client:
        long = [{"role": "user", "content": "a" * (MAX_MODEL_LEN - 50)}]
        answer = client.messages.create(model="fake", messages=long, max_tokens=50)
    assert num_prompt_tokens(answer) + answer.usage.output_tokens == MAX_MODEL_LEN
    assert answer.stop_reason == "model_context_window_exceeded"


def test_a_begun_answer_is_gone_on_from(client) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "The capital of"}]}]
    answer = ask(client, begun)
    assert answer.content[0].text.startswith(" France")
    assert num_prompt_tokens(answer) == num_prompt_tokens(ask(client)) + 3


def test_prompts_are_those_of_the_chats_they_ask_for(client, demo_server) -> None:
    """As texts or blocks, with a system prompt or without: what the template makes of it is the same."""

    def tokenized(*messages: tuple[str, str]) -> int:
        chat = [{"role": role, "content": content} for role, content in messages]
        return httpx.post(f"{demo_server.url}/tokenize", json={"messages": chat}).json()["count"]

    def blocks(*texts: str) -> list[dict[str, Any]]:
        return [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}} for text in texts]

    for system, first in (("Be brief.\nBe kind.", "a\nb"), (blocks("Be brief.", "Be kind."), blocks("a", "b"))):
        turns = [("user", first), ("assistant", "c"), ("user", "d"), ("user", "e")]
        messages = [{"role": role, "content": content} for role, content in turns]
        wanted = tokenized(("system", "Be brief.\nBe kind."), ("user", "a\nb"), ("assistant", "c"), ("user", "d\ne"))
        counted = client.messages.count_tokens(model=MODEL_NAME, system=system, messages=messages)
        assert counted.input_tokens == wanted
        assert num_prompt_tokens(ask(client, messages, system=system, max_tokens=1)) == wanted


def test_an_answer_follows_its_schema(client) -> None:
    class Capital(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        city: str = pydantic.Field(max_length=12)
        on_the_sea: bool

    parsed = client.messages.parse(**fields(max_tokens=80), output_format=Capital)
    assert isinstance(parsed.parsed_output, Capital)


# Tools


def tool_result(call: Any, content: Any = "18 degrees", **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call.id, "content": content} | more


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_agent_takes_three_turns_with_tools(client, is_streamed) -> None:
    results = ["18 degrees", [{"type": "text", "text": "12:00"}, {"type": "text", "text": "noon"}], "no such city"]
    messages: list[Any] = [*WEATHER]
    for name, result in zip(("get_weather", "get_time", "get_weather"), results, strict=True):
        more = {"tools": TOOLS, "tool_choice": {"type": "tool", "name": name}, "max_tokens": 60}
        counted = client.messages.count_tokens(
            model=MODEL_NAME, messages=messages, tools=TOOLS, tool_choice=more["tool_choice"]
        )
        message = streamed(client, messages, **more)[1] if is_streamed else ask(client, messages, **more)
        assert message.stop_reason == "tool_use"
        assert num_prompt_tokens(message) == counted.input_tokens
        (call,) = calls_of(message)
        assert call.name == name and call.id.startswith("toolu_")
        is_error = result == "no such city"
        messages += [
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": [tool_result(call, result, is_error=is_error)]},
        ]
    answer = ask(client, messages, tools=TOOLS, tool_choice={"type": "none"})
    assert answer.content and not calls_of(answer) and answer.stop_reason in ("end_turn", "max_tokens")


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "any", "disable_parallel_tool_use": True}])
def test_any_tool_may_be_called(client, choice) -> None:
    more = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 60}
    message = ask(client, WEATHER, **more)
    assert {block.type for block in message.content} == {"tool_use"}
    if "disable_parallel_tool_use" in choice:
        assert len(calls_of(message)) == 1 and message.stop_reason == "tool_use"
    assert told(streamed(client, WEATHER, **more)[1])["content"] == told(message)["content"]


def test_a_call_that_is_cut_off_has_what_there_is_of_its_input(client) -> None:
    more = {"tools": [tool("note", text={"type": "string"})], "tool_choice": {"type": "tool", "name": "note"}}
    message = ask(client, max_tokens=24, **more)
    assert message.stop_reason == "max_tokens"
    assert [block.type for block in message.content] == ["tool_use"] and isinstance(message.content[0].input, dict)
    assert told(streamed(client, max_tokens=24, **more)[1]) == told(message)


def test_without_a_choice_the_model_may_answer_in_words(client) -> None:
    message = ask(client, tools=TOOLS)
    assert calls_of(message) or message.content[0].text
    none = ask(client, tools=TOOLS, tool_choice={"type": "none"})
    assert num_prompt_tokens(none) == num_prompt_tokens(ask(client))


# Fields


def test_fields_that_clients_add_are_ignored_and_named(client) -> None:
    answer = client.beta.messages.with_raw_response.create(
        **fields(max_tokens=1, extra_body={"mood": "good", "nothing": None}),
        metadata={"user_id": "u"},
        thinking={"type": "enabled", "budget_tokens": 1024},
        betas=["context-management-2025-06-27"],
        context_management={"edits": []},
    )
    assert answer.headers["x-ignored-fields"].split(", ") == ["context_management", "mood", "thinking"]
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    assert "x-ignored-fields" not in client.messages.with_raw_response.create(**fields(max_tokens=1)).headers


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"tools": [TOOLS[0], {"type": "web_search_20250305", "name": "web_search"}]}, "tools[1]"),
        ({"tools": [TOOLS[0] | {"input_schema": {"type": "array"}}]}, "tools[0].input_schema"),
        ({"extra_body": {"temperature": "warm"}}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "none_such"}, "tools": TOOLS}, "none_such"),
        ({"messages": [{"role": "user", "content": "a " * 20_000}]}, "context"),
    ],
)
def test_what_cannot_be_is_refused_by_name(client, more, named) -> None:
    for is_streamed in (False, True):
        with pytest.raises(anthropic.BadRequestError) as caught:
            client.messages.create(**fields(**more), stream=is_streamed)
        assert caught.value.body["error"]["type"] == "invalid_request_error"
        assert named in caught.value.body["error"]["message"]
        assert caught.value.request_id == caught.value.body["request_id"]


def test_an_unknown_model_is_not_found(client) -> None:
    for call in (client.messages.create, client.messages.count_tokens):
        more = {} if call == client.messages.count_tokens else {"max_tokens": 1}
        with pytest.raises(anthropic.NotFoundError) as caught:
            call(model="no-such-model", messages=QUESTION, **more)
        assert caught.value.body["error"]["type"] == "not_found_error"
