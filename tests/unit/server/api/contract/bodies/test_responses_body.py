"""A request for a response is the chat that it says, and what is wrong with it is named as it was sent."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from stellarbyte_server.api.contract.bodies.body import parse_body
from stellarbyte_server.api.contract.bodies.chat import MAX_MESSAGES, MAX_PARTS
from stellarbyte_server.api.contract.bodies.responses.body import ResponsesBody
from stellarbyte_server.api.contract.bodies.responses.chat import ResponseChat
from stellarbyte_server.api.contract.errors import ApiError, bad_request

TOOL = {"type": "function", "name": "look", "description": "Looks.", "parameters": {"type": "object"}}
OTHER = {"type": "function", "name": "hear"}
USER = {"role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"at": 1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "a cat"}


def parsed(**fields: Any) -> ResponsesBody:
    text = json.dumps({"model": "m", "input": "hi"} | fields).encode()
    return parse_body(ResponsesBody, text, warn_unknown=False)[0]


def chat_of(**fields: Any) -> ResponseChat:
    return ResponseChat.of(parsed(**fields))


def messages(*items: Any, **fields: Any) -> list[dict[str, Any]]:
    return [message.model_dump(exclude_none=True) for message in chat_of(input=items, **fields).body.messages]


def tool_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{"role": "robot", "content": "hi"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"text": "hi"}]}]}, "input[0].content[0].type"),
        ({"input": [USER, {"role": "user", "content": [{"type": "input_image"}]}]}, "input[1].content[0]"),
        ({"input": [{"role": "assistant", "content": [{"type": "refusal"}]}]}, "input[0].content[0].refusal"),
        ({"input": [USER, {"type": "item_reference", "id": "msg_1"}]}, "input[1]"),
        ({"input": [{"type": "web_search_call"}]}, "input[0]"),
        ({"input": [{"type": []}]}, "input[0]"),
        ({"input": [CALL | {"call_id": ""}]}, "input[0].call_id"),
        ({"input": [CALL | {"name": "a b"}]}, "input[0].name"),
        ({"input": [CALL | {"arguments": {}}]}, "input[0].arguments"),
        ({"input": [CALL, RESULT | {"output": None}]}, "input[1].output"),
        ({"input": [CALL, RESULT | {"output": [{"type": "input_image"}]}]}, "input[1].output[0]"),
        ({"input": [CALL, RESULT | {"call_id": None}]}, "input[1].call_id"),
        ({"tools": [TOOL, {"type": "web_search"}]}, "tools[1]"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "look"}}]}, "tools[0].name"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [TOOL | {"more": 1}]}, "tools[0].more"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "none", "tools": [OTHER]}}, "tool_choice.mode"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.tools"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}},
            "tool_choice.tools[0]",
        ),
        ({"max_tool_calls": 0}, "max_tool_calls"),
        ({"include": ["all"]}, "include[0]"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"reasoning": {"depth": 1}}, "reasoning.depth"),
        ({"conversation": "c"}, "conversation"),
        ({"presence_penalty": 3}, "presence_penalty"),
    ],
)
def test_a_wrong_field_is_named_by_its_path(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parsed(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert f"'{param}'" in str(caught.value) and "\n" not in str(caught.value)
    assert "variant" not in str(caught.value)


EVERYTHING = {
    "input": [
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me look."}]},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}], "summary": []},
        CALL,
        RESULT | {"output": [{"type": "input_text", "text": "a cat"}]},
    ],
    "instructions": "Be brief.",
    "tools": [TOOL, OTHER],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "look"}]},
    "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}},
    "reasoning": {"effort": "low"},
    "max_reasoning_tokens": 9,
    "include_reasoning": True,
    "chat_template_kwargs": {"enable_thinking": True},
    "include": ["message.output_text.logprobs"],
}
VALUES: list[Any] = [
    None,
    True,
    -1,
    0.5,
    "",
    "none",
    "x" * 300,
    [],
    {},
    [[]],
    [None],
    [{}],
    {"type": []},
    {"type": "x"},
]


def changed(value: Any) -> Iterator[Any]:
    """The value with one of its parts replaced, each part and each replacement in turn."""
    yield from VALUES
    places = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for place, part in places:
        for other in changed(part):
            yield {**value, place: other} if isinstance(value, dict) else [*value[:place], other, *value[place + 1 :]]


def test_no_value_of_any_part_is_more_than_refused() -> None:
    chat_of(**EVERYTHING)
    num_refused = 0
    for fields in changed(EVERYTHING):
        if not isinstance(fields, dict):
            continue
        try:
            chat_of(**fields)
        except ApiError as error:
            num_refused += 1
            assert error.status == 400 and error.param and "\n" not in str(error) and "variant" not in str(error)
    assert num_refused > 400


def test_what_asks_for_nothing_is_fine() -> None:
    parsed(tools=[], tool_choice="none", include=[], background=False, stream_options={"include_obfuscation": False})
    parsed(include=["reasoning.encrypted_content", "web_search_call.action.sources"], max_tool_calls=3)
    parsed(tools=[TOOL | {"strict": None, "async": False, "allowed_callers": ["direct"]}])
    assert not parsed(include=["reasoning.encrypted_content"]).with_logprobs
    assert parsed(include=["reasoning.encrypted_content", "message.output_text.logprobs"]).with_logprobs


@pytest.mark.parametrize(
    ("reasoning", "paths"),
    [
        (None, []),
        ({}, []),
        ({"effort": None, "summary": None}, []),
        ({"effort": "none", "context": "auto", "mode": "standard"}, []),
        ({"effort": "high", "summary": "auto"}, ["reasoning.summary"]),
        ({"generate_summary": "concise"}, ["reasoning.generate_summary"]),
    ],
)
def test_what_changes_no_answer_is_known(reasoning: Any, paths: list[str]) -> None:
    assert parsed(reasoning=reasoning).without_effect == paths


def test_the_items_of_one_answer_are_one_message() -> None:
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me look."}]}
    found = messages(
        USER, said, CALL, CALL | {"call_id": "c2", "name": "hear"}, RESULT, RESULT | {"call_id": "c2"}, USER
    )
    assert found == [
        USER,
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [tool_call("c1", "look", '{"at": 1}'), tool_call("c2", "hear", '{"at": 1}')],
        },
        {"role": "tool", "content": "a cat", "tool_call_id": "c1"},
        {"role": "tool", "content": "a cat", "tool_call_id": "c2"},
        USER,
    ]


def test_text_after_calls_belongs_to_their_message() -> None:
    after = {"role": "assistant", "content": "There."}
    assert messages(USER, CALL, after, RESULT)[1:] == [
        {"role": "assistant", "content": "There.", "tool_calls": [tool_call("c1", "look", '{"at": 1}')]},
        {"role": "tool", "content": "a cat", "tool_call_id": "c1"},
    ]


def test_messages_without_calls_stay_apart() -> None:
    two = [{"role": "assistant", "content": "One."}, {"role": "assistant", "content": "Two."}]
    assert messages(USER, *two) == [USER, *two]


def test_an_answers_items_are_taken_as_they_came() -> None:
    """With their ids, statuses and phases, and with what the official client adds to them."""
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None, "status": None}
    part = {"type": "output_text", "text": "Let me look.", "annotations": [], "logprobs": [], "parsed": None}
    said = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "phase": "commentary"}
    call = CALL | {"id": "fc_1", "status": "completed", "parsed_arguments": {"at": 1}, "namespace": None}
    result = RESULT | {"id": None, "status": "completed", "output": [{"type": "input_text", "text": "a cat"}]}
    found = messages(USER, reasoning, said | {"content": [part]}, call, result)
    assert found == messages(USER, {"role": "assistant", "content": "Let me look."}, CALL, RESULT)


def thought(*texts: str, **more: Any) -> dict[str, Any]:
    return {"type": "reasoning", "content": [{"type": "reasoning_text", "text": text} for text in texts]} | more


SAID = {"role": "assistant", "content": "Hi."}
AT = '{"at": 1}'
TOOL_CALLS = [tool_call("c1", "look", AT)]
CALLED = {"role": "assistant", "tool_calls": TOOL_CALLS}
SEEN = {"role": "tool", "content": "a cat", "tool_call_id": "c1"}


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([thought("a", "b"), SAID], [SAID | {"reasoning_content": "a\nb"}]),
        ([thought("a"), CALL, RESULT], [CALLED | {"reasoning_content": "a"}, SEEN]),
        ([thought("a"), SAID, CALL, RESULT], [CALLED | SAID | {"reasoning_content": "a"}, SEEN]),
        ([SAID, thought("a"), CALL, RESULT], [CALLED | SAID | {"reasoning_content": "a"}, SEEN]),
        (
            [thought("a"), CALL, thought("b"), CALL | {"call_id": "c2"}, RESULT, RESULT | {"call_id": "c2"}],
            [
                CALLED | {"reasoning_content": "a\nb", "tool_calls": [*TOOL_CALLS, tool_call("c2", "look", AT)]},
                SEEN,
                SEEN | {"tool_call_id": "c2"},
            ],
        ),
        (
            [thought("a"), CALL, RESULT, thought("b"), SAID],
            [CALLED | {"reasoning_content": "a"}, SEEN, SAID | {"reasoning_content": "b"}],
        ),
        ([SAID, thought("a"), SAID], [SAID, SAID | {"reasoning_content": "a"}]),
        ([thought("a"), USER], [{"role": "assistant", "reasoning_content": "a"}, USER]),
        ([SAID, thought("a")], [SAID, {"role": "assistant", "reasoning_content": "a"}]),
        ([thought(summary=[{"type": "summary_text", "text": "s"}]), SAID], [SAID | {"reasoning_content": "s"}]),
        ([thought("a", summary=[{"type": "summary_text", "text": "s"}]), SAID], [SAID | {"reasoning_content": "a"}]),
        ([thought(), USER], [USER]),
    ],
)
def test_reasoning_goes_back_with_what_followed_it(items: list[Any], expected: list[Any]) -> None:
    assert messages(USER, *items)[1:] == expected


def test_errors_of_reasoning_alone_name_its_item() -> None:
    chat = chat_of(input=[USER, thought("a"), USER])
    assert [chat.name_of(f"messages[{i}]") for i in range(3)] == ["input[0]", "input[1]", "input[2]"]


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ("hm", "input[0].content"),
        ([{"type": "reasoning_text"}], "input[0].content[0].text"),
        ([{"type": "image", "text": "a"}], "input[0].content[0].type"),
        ([{"type": "reasoning_text", "text": "a"}] * (MAX_PARTS + 1), "input[0].content"),
    ],
)
def test_reasoning_of_another_form_is_refused_by_name(content: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parsed(input=[{"type": "reasoning", "content": content}, USER])
    assert (caught.value.status, caught.value.param) == (400, param)


def test_fields_of_reasoning_are_those_of_the_chat() -> None:
    fields = {"max_reasoning_tokens": 7, "include_reasoning": False, "chat_template_kwargs": {"mood": 1}}
    body = chat_of(**fields, reasoning={"effort": "low"}).body
    assert {name: getattr(body, name) for name in fields} == fields
    assert body.reasoning_effort == "low"


def test_a_refusal_is_a_text_of_the_assistant() -> None:
    parts = [{"type": "refusal", "refusal": "No."}, {"type": "output_text", "text": "Sorry."}]
    assert messages({"role": "assistant", "content": parts}) == [{"role": "assistant", "content": "No.\nSorry."}]


def test_allowed_tools_are_those_of_the_chat() -> None:
    """The model sees the others, too."""
    named = {"type": "function", "name": "hear"}
    chat = chat_of(tools=[TOOL, OTHER], tool_choice={"type": "allowed_tools", "mode": "required", "tools": [named]})
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "hear"}}]}
    assert [tool.function.name for tool in chat.body.tools or ()] == ["look", "hear"]
    assert chat.body.tool_choice.model_dump() == {"type": "allowed_tools", "allowed_tools": allowed}


@pytest.mark.parametrize("choice", ["none", "auto", "required", {"type": "function", "name": "look"}])
def test_every_choice_is_one_of_the_chat(choice: Any) -> None:
    chosen = chat_of(tools=[TOOL], tool_choice=choice).body.tool_choice
    assert getattr(chosen, "function", None) is None or chosen.function.name == "look"
    assert isinstance(chosen, str) == isinstance(choice, str)


@pytest.mark.parametrize(
    ("param", "name"),
    [
        ("messages", "input"),
        ("messages[0].content", "instructions"),
        ("messages[1].content", "input[0].content"),
        ("messages[2]", "input[2]"),
        ("messages[2].tool_calls[0].function.arguments", "input[3].arguments"),
        ("messages[2].tool_calls[1].id", "input[4].call_id"),
        ("messages[3].tool_call_id", "input[5].call_id"),
        ("max_tokens", "max_output_tokens"),
        ("response_format", "text.format"),
        ("reasoning_effort", "reasoning.effort"),
        ("max_reasoning_tokens", "max_reasoning_tokens"),
        ("tools[0].function.name", "tools[0].name"),
        ("temperature", "temperature"),
        (None, None),
    ],
)
def test_errors_of_the_chat_name_the_requests_field(param: str | None, name: str | None) -> None:
    said = {"role": "assistant", "content": "Let me look."}
    items = [USER, {"type": "reasoning"}, said, CALL, CALL | {"call_id": "c2"}, RESULT]
    error = chat_of(input=items, instructions="Be brief.", tools=[TOOL]).renamed(bad_request(f"See '{param}'.", param))
    assert (error.param, str(error)) == (name, f"See '{name}'.")


def test_one_message_too_many_is_refused() -> None:
    """The instructions are a message, too."""
    with pytest.raises(ApiError) as caught:
        chat_of(input=[USER] * MAX_MESSAGES, instructions="Be brief.")
    assert (caught.value.status, caught.value.param) == (400, "input")
