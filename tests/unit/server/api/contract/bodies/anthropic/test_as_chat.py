"""Anthropic's requests: the chats they ask for, and what is refused in their own terms."""

import json
from typing import Any

import pytest

from stellarbyte_server.api.chat.tools import Toolbox
from stellarbyte_server.api.contract.bodies.anthropic.as_chat import as_chat, without_effect
from stellarbyte_server.api.contract.bodies.anthropic.messages import CountTokensBody, MessagesBody
from stellarbyte_server.api.contract.bodies.body import parse_body
from stellarbyte_server.api.contract.bodies.chat import MAX_MESSAGES, ChatBody
from stellarbyte_server.api.contract.errors import ApiError, bad_request

BODY = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"name": "f", "input_schema": {"type": "object"}}


def parsed(**fields: Any) -> tuple[MessagesBody, list[str]]:
    return parse_body(MessagesBody, json.dumps(BODY | fields).encode(), warn_unknown=False)


def chat(**fields: Any) -> ChatBody:
    return as_chat(parsed(**fields)[0])[0]


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.status == 400 and "\n" not in str(caught.value)
    return caught.value


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value} | more


def call(name: str = "f", call_id: str = "c", **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def result(content: Any = "r", call_id: str = "c", **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content} | more


def turns(**fields: Any) -> list[tuple[Any, ...]]:
    """Each message of the chat: role and content, with its calls or with what it is the result of."""
    told: list[tuple[Any, ...]] = []
    for message in chat(**fields).messages:
        calls = tuple((each.id, each.function.name, each.function.arguments) for each in message.tool_calls or ())
        rest = (*calls, *(() if message.tool_call_id is None else (message.tool_call_id,)))
        told.append((message.role, message.content, *rest))
    return told


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [("user", "hi")]),
        ({"system": "s"}, [("system", "s"), ("user", "hi")]),
        ({"system": [text("a"), text("b", cache_control={"type": "ephemeral", "ttl": "1h"})]}, [("system", "a\nb")]),
        ({"messages": [user(text("a"), text("b")), user(text("c"))]}, [("user", "a\nb\nc")]),
        ({"messages": [user(text("a")), assistant(text("b")), assistant(text("c"))]}, [("user", "a"), None]),
        ({"messages": [user(), assistant(), user(text("a"))]}, [("user", ""), ("assistant", ""), ("user", "a")]),
        (
            {
                "messages": [
                    user(text("q")),
                    assistant(text("t"), call(x=1), call("g", "d")),
                    user(result(), result("s", "d")),
                ]
            },
            [
                ("user", "q"),
                ("assistant", "t", ("c", "f", '{"x":1}'), ("d", "g", "{}")),
                ("tool", "r", "c"),
                ("tool", "s", "d"),
            ],
        ),
        (
            {
                "messages": [
                    user(text("q")),
                    assistant(call()),
                    user(text("now"), result([text("a"), text("b")]), text("go")),
                ]
            },
            [("user", "q"), ("assistant", None, ("c", "f", "{}")), ("tool", "a\nb", "c"), ("user", "now\ngo")],
        ),
        (
            {"messages": [user(text("q")), assistant(call()), user(result("no", is_error=True))]},
            [("user", "q"), ("assistant", None, ("c", "f", "{}")), ("tool", "Error: no", "c")],
        ),
        (
            {"messages": [user(text("q")), assistant(call()), user({"type": "tool_result", "tool_use_id": "c"})]},
            [("user", "q"), ("assistant", None, ("c", "f", "{}")), ("tool", "", "c")],
        ),
        (
            {
                "messages": [
                    user(text("q")),
                    assistant(
                        {"type": "thinking", "thinking": "hm", "signature": ""},
                        {"type": "redacted_thinking", "data": "x"},
                        text("a"),
                    ),
                    user(text("b")),
                ]
            },
            [("user", "q"), ("assistant", "a"), ("user", "b")],
        ),
    ],
)
def test_messages_become_turns_of_a_chat(fields: dict[str, Any], expected: list[tuple[Any, ...] | None]) -> None:
    found = turns(**fields)
    assert all(turn is None or turn == got for turn, got in zip(expected, found, strict=False))
    assert len(found) >= len(expected)


def thinking(value: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": value, "signature": "x"}


def test_thinking_goes_back_as_the_turns_reasoning() -> None:
    found = chat(
        messages=[
            user(text("q")),
            assistant(thinking("a"), {"type": "redacted_thinking", "data": "x"}, call()),
            user(result()),
            assistant(thinking("b"), text("t"), thinking("c")),
            user(text("r")),
            assistant(thinking("")),
            user(text("s")),
        ]
    ).messages
    assert [message.reasoning_content for message in found] == [None, "a", None, "b\nc", None, None, None]
    assert [message.content for message in found] == ["q", None, "r", "t", "r", "", "s"]


def test_an_answer_cannot_go_on_from_thinking_alone() -> None:
    error = refusal(messages=[user(text("q")), assistant(thinking("a"))])
    assert error.param == "messages[1]" and "has only thinking" in str(error)
    assert chat(messages=[user(text("q")), assistant(thinking("a"), text("b"))]).continue_final_message


SWITCHED_ON, SWITCHED_OFF = ({"enable_thinking": value, "thinking": value} for value in (True, False))


@pytest.mark.parametrize(
    ("config", "variables", "most", "is_shown"),
    [
        (None, None, None, False),
        ({"type": "enabled", "budget_tokens": 9}, SWITCHED_ON, 9, True),
        ({"type": "enabled", "budget_tokens": 9, "display": "omitted"}, SWITCHED_ON, 9, True),
        ({"type": "adaptive"}, None, None, True),
        ({"type": "disabled"}, SWITCHED_OFF, None, False),
        ({"type": "between_tools"}, SWITCHED_OFF, None, False),
    ],
)
def test_thinking_is_the_reasoning_of_the_chat(config: Any, variables: Any, most: int | None, is_shown: bool) -> None:
    found = chat(thinking=config)
    assert (found.chat_template_kwargs, found.max_reasoning_tokens) == (variables, most)
    assert found.include_reasoning is is_shown


def test_the_effort_is_that_of_the_chat() -> None:
    assert chat(output_config={"effort": "xhigh"}).reasoning_effort == "xhigh"
    assert refusal(output_config={"effort": "huge"}).param == "output_config.effort"
    _, in_terms = as_chat(parsed()[0])
    assert in_terms(bad_request("See 'reasoning_effort'.", "reasoning_effort")).param == "output_config.effort"
    assert in_terms(bad_request("x", "max_reasoning_tokens")).param == "thinking.budget_tokens"


KWARGS = ("chat_template_kwargs.enable_thinking", "chat_template_kwargs.thinking")


@pytest.mark.parametrize(
    ("kind", "ignored", "thinks", "expected"),
    [
        (None, ("reasoning_effort",), True, ["output_config.effort"]),
        ("enabled", KWARGS, False, ["thinking"]),
        ("enabled", KWARGS, True, []),  # it thinks by itself
        ("enabled", KWARGS[1:], False, []),  # the template has a switch
        ("disabled", KWARGS, True, ["thinking"]),
        ("disabled", KWARGS[:1], True, []),
        ("disabled", (*KWARGS, "reasoning_effort"), False, ["output_config.effort"]),
        ("adaptive", (), False, []),
    ],
)
def test_what_changes_nothing_is_named(kind: str | None, ignored: Any, thinks: bool, expected: list[str]) -> None:
    body, _ = parsed(thinking=None if kind is None else {"type": kind, "budget_tokens": 1})
    assert without_effect(body, ignored, thinks=thinks) == expected


def test_turns_of_one_role_are_joined_in_a_time_that_grows_with_their_length() -> None:
    many = [user(text(str(number))) for number in range(MAX_MESSAGES)]
    (turn,) = turns(messages=many)
    assert turn == ("user", "\n".join(map(str, range(MAX_MESSAGES))))


def test_a_last_message_of_the_assistant_is_gone_on_from() -> None:
    assert chat(messages=[user(text("q")), assistant(text("The"))]).continue_final_message is True
    assert chat().continue_final_message is None
    assert "messages[1]" in str(refusal(messages=[user(text("q")), assistant(call())]))
    wanted = {"format": {"type": "json_schema", "schema": {}}}
    assert "output_config.format" in str(refusal(messages=[assistant(text("a"))], output_config=wanted))


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        (None, None, None),
        ({"type": "auto"}, "auto", True),
        ({"type": "any"}, "required", True),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "none"}, "none", True),
        ({"type": "tool", "name": "f"}, "f", False),
    ],
)
def test_tools_and_choices_are_those_of_chats(choice: Any, expected: Any, parallel: bool | None) -> None:
    made = chat(tools=[TOOL | {"description": "d", "type": "custom"}], tool_choice=choice)
    (function,) = [tool.function for tool in made.tools or ()]
    assert (function.name, function.description, function.parameters) == ("f", "d", {"type": "object"})
    named = made.tool_choice if isinstance(made.tool_choice, str | None) else made.tool_choice.function.name
    assert (named, made.parallel_tool_calls) == (expected, parallel)


def test_fields_are_those_of_chats() -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 4, "seed": 7, "stream": True, "adapter_scale": 2.0}
    made = chat(**fields, stop_sequences=["a", "b"], output_config={"format": {"type": "json_schema", "schema": {}}})
    assert {name: getattr(made, name) for name in fields} == fields
    assert (made.stop, made.max_tokens) == (("a", "b"), 5)
    assert made.response_format is not None and made.response_format.type == "json_schema"


def test_unknown_fields_are_named_wherever_they_are() -> None:
    _, ignored = parsed(
        mood="good",
        nothing=None,
        messages=[
            user(text("a", mood=1, citations=None)),
            assistant(call() | {"caller": {}}),
            user(result([text("r", m=1)])),
        ],
        tools=[TOOL | {"defer_loading": True}],
        metadata={"user_id": "u", "team": "t"},
    )
    assert set(ignored) == {
        "mood",
        "messages[0].content[0].mood",
        "messages[1].content[0].caller",
        "messages[2].content[0].content[0].m",
        "tools[0].defer_loading",
        "metadata.team",
    }


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [user(5)]}, "messages[0].content[0]"),
        ({"messages": [user({"text": "a"})]}, "messages[0].content[0]"),
        ({"messages": [user({"type": ["text"], "text": "a"})]}, "messages[0].content[0]"),
        ({"messages": [user(text("a"), {"type": "image", "source": {}})]}, "messages[0].content[1]"),
        ({"messages": [user({"type": "document", "source": {}})]}, "messages[0].content[0]"),
        ({"messages": [user({"type": "text"})]}, "messages[0].content[0].text"),
        (
            {"messages": [user(text("a", cache_control={"type": "eternal"}))]},
            "messages[0].content[0].cache_control.type",
        ),
        ({"messages": [user(call())]}, "messages[0]"),
        ({"messages": [assistant(result())]}, "messages[0]"),
        ({"messages": [user(result([text("a"), {"type": "image"}]))]}, "messages[0].content[0].content[1]"),
        ({"messages": [user(result(is_error="yes"))]}, "messages[0].content[0].is_error"),
        (
            {"messages": [assistant({"type": "tool_use", "id": "c", "name": "f", "input": "{}"})]},
            "messages[0].content[0].input",
        ),
        ({"messages": [assistant({"type": "server_tool_use", "id": "c"})]}, "messages[0].content[0]"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"system": 5}, "system"),
        ({"tools": [TOOL, {"type": "web_search_20250305", "name": "web_search"}]}, "tools[1]"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [TOOL | {"name": "no spaces"}]}, "tools[0].name"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tool_choice": {"type": "auto", "name": "f"}}, "tool_choice"),
        ({"thinking": {"type": "enabled"}}, "thinking"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
        ({"stop_sequences": [1]}, "stop_sequences"),
        ({"metadata": {"user_id": 5}}, "metadata.user_id"),
        ({"service_tier": "cheap"}, "service_tier"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"messages": [user(*[text("")] * 10_001)]}, "messages[0].content"),
        ({"messages": [user(*[result()] * 10_000), assistant(), user(*[result()] * 9)]}, "messages"),
        ({"messages": [user(*[text("")] * 8000)] * 3}, "messages"),
        ({"messages": [user(*[result([text("")] * 6000)] * 4)]}, "messages"),
        ({"messages": [assistant(*[call()] * 129), user(text("a"))]}, "messages[0]"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], named: str) -> None:
    error = refusal(**fields)
    assert error.param == named and f"'{named}'" in str(error)


@pytest.mark.parametrize(
    ("message", "param", "expected"),
    [
        ("'messages[0].content' is odd", "messages[0].content", ("'system' is odd", "system")),
        ("'messages[1]'", "messages[1]", ("'messages[0]'", "messages[0]")),
        ("'messages[2].tool_calls[1].id'", "messages[2].tool_calls[1].id", ("'messages[1]'", "messages[1]")),
        ("'messages[3].tool_call_id'", "messages[3]", ("'messages[2].content[1]'", "messages[2].content[1]")),
        ("'messages[99]'", "messages[99]", ("'messages[99]'", "messages[99]")),
        (
            "'tools[0].function.parameters' at #/a",
            "tools[0].function.parameters",
            ("'tools[0].input_schema' at #/a", "tools[0].input_schema"),
        ),
        ("'response_format'", "response_format", ("'output_config.format'", "output_config.format")),
        ("'max_tokens' is less", "max_tokens", ("'max_tokens' is less", "max_tokens")),
        ("no field", None, ("no field", None)),
    ],
)
def test_errors_of_the_chat_name_fields_of_the_request(message: str, param: str | None, expected: Any) -> None:
    blocks = [text("q")], [call()], [text("now"), result()]
    messages = [user(*blocks[0]), assistant(*blocks[1]), user(*blocks[2])]
    _, in_terms = as_chat(parsed(system="s", messages=messages)[0])
    error = in_terms(bad_request(message, param, "a_code"))
    assert (str(error), error.param, error.code) == (*expected, "a_code")


def test_counting_takes_what_a_message_takes_and_needs_no_limit() -> None:
    content = {"model": "m", "messages": BODY["messages"], "system": "s", "tools": [TOOL]}
    body, ignored = parse_body(CountTokensBody, json.dumps(content | {"max_tokens": 5}).encode(), warn_unknown=False)
    counted, _ = as_chat(body)
    asked = chat(system="s", tools=[TOOL])
    assert ignored == ["max_tokens"]
    assert (counted.messages, counted.tools) == (asked.messages, asked.tools)
    assert Toolbox.of(counted.tools, counted.tool_choice, counted.parallel_tool_calls, None) is not None
