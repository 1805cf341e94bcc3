"""Files of examples: each line is a chat that the trainer reads, or a sentence says what is wrong with it."""

import io
import json

import pytest

from stellarbyte_server.tuning import examples
from stellarbyte_server.tuning.examples import Template, check_examples
from tests.support.tuning.chats import chat, json_lines

PLAIN, FULL = Template(shows_tools=False, shows_calls=False), Template(shows_tools=True, shows_calls=True)
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "2", "tool_call_id": "c1"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def check(content: bytes, template: Template = PLAIN) -> tuple[int, list[str], list[object]]:
    """Their number, the problems as LINE: MESSAGE, and what is trained, by line."""
    normalized = io.BytesIO()
    number, problems = check_examples(io.BytesIO(content), normalized, template)
    lines = normalized.getvalue().split(b"\n")
    shown = [f"{problem.line}: {problem.message}" for problem in problems]
    return number, shown, [json.loads(line) if line else None for line in lines[:-1]]


def of(*messages: object, **fields: object) -> bytes:
    return json.dumps({"messages": list(messages), **fields}).encode()


def test_chats_stay_as_they_are_in_their_lines() -> None:
    first, second = chat("one", "eins"), chat("two", "zwei", weight=1)
    content = json_lines([first]) + b"\n  \n" + json_lines([second])
    assert check(b"\xef\xbb\xbf" + content) == (2, [], [first, None, None, second])
    assert check(content.replace(b"\n", b"\r\n"))[0] == 2
    assert check(content.rstrip(b"\n"))[0] == 2


def test_other_spellings_of_a_chat_become_one() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert check(of({"role": "user", "content": parts}, ANSWER))[2] == [
        {"messages": [{"role": "user", "content": "ab"}, ANSWER]}
    ]
    assert check(b'{"prompt": "q", "completion": "a"}')[2] == [{"messages": [USER, ANSWER]}]
    nulls = {**ANSWER, "name": None, "refusal": None, "weight": None, "tool_calls": None}
    assert check(of(USER, nulls, tools=[]))[2] == [{"messages": [USER, ANSWER]}]
    weighted = {**ANSWER, "weight": 0.0}
    assert check(of(USER, weighted, USER, ANSWER))[2][0]["messages"][1] == {**ANSWER, "weight": 0}


def test_calls_are_shown_to_the_template_as_chats_show_them() -> None:
    _, problems, (example,) = check(of(USER, CALLING, RESULT, ANSWER, tools=[TOOL]), FULL)
    assert problems == [] and example["tools"] == [TOOL]
    assert example["messages"][1]["content"] == ""
    assert example["messages"][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    text = {**CALLING, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{cut"}}]}
    (example,) = check(of(USER, text, RESULT, ANSWER), FULL)[2]
    assert example["messages"][1]["tool_calls"][0]["function"]["arguments"] == "{cut"


BAD = [
    (b"\xff", "not valid UTF-8"),
    (b'{"messages": [', "not valid JSON"),
    (b'{"messages": NaN}', "not valid JSON"),
    (rb'{"prompt": "\ud800", "completion": "a"}', "not valid"),
    (b"[" * 5000, "not valid JSON"),
    (b"[]", "must be a JSON object"),
    (b"{}", "'messages' must be a list"),
    (b'{"prompt": "q"}', "'completion' must be a text"),
    (b'{"prompt": "", "completion": "a"}', "'prompt' must be a text that is not empty"),
    (b'{"prompt": "q", "completion": "a", "other": 1}', "'other' is unknown"),
    (of(USER, ANSWER, functions=[]), "'functions' is unknown"),
    (of(), "at least one message"),
    (of("hi"), "messages[0] must be an object"),
    (of({"content": "q"}, ANSWER), "messages[0].role must be one of system"),
    (of({"role": "robot", "content": "q"}, ANSWER), "messages[0].role must be one of"),
    (of({"role": "user"}, ANSWER), "messages[0].content must be a text"),
    (of(USER, {"role": "assistant", "content": ""}), "messages[1].content must be a text that is not empty"),
    (of({"role": "user", "content": [{"type": "image_url"}]}, ANSWER), "messages[0].content[0] must be a text part"),
    (of({**USER, "weight": 1}, ANSWER), "messages[0].weight is not a field of a message with the role user"),
    (of(USER, {**ANSWER, "weight": 0.5}), "messages[1].weight must be 0 or 1"),
    (of(USER, {**ANSWER, "weight": True}), "messages[1].weight must be 0 or 1"),
    (of(USER, {**ANSWER, "weight": 0}), "every answer has weight 0"),
    (of(USER, {**ANSWER, "refusal": "no"}), "messages[1].refusal must be null"),
    (of(USER, ANSWER, USER), "last message must be the assistant's"),
    (of(USER, CALLING, RESULT, ANSWER), "tool_calls cannot be learned"),
    (of(USER, ANSWER, tools=[TOOL]), "'tools' cannot be learned"),
]
BAD_CALLS = [
    (
        of(USER, {**CALLING, "tool_calls": [{"id": "c1"}]}, RESULT, ANSWER),
        "messages[1].tool_calls[0] must be an object",
    ),
    (of(USER, {**CALLING, "tool_calls": {}}, ANSWER), "messages[1].tool_calls must be a list"),
    (of(USER, RESULT, ANSWER), "messages[1].tool_call_id must be the id of a call"),
    (of(USER, CALLING, ANSWER), "messages[2] must be the result of the call 'c1'"),
    (of(USER, ANSWER, tools={}), "'tools' must be a list"),
    (of(USER, ANSWER, tools=["f"]), "tools[0] must be an object"),
]


@pytest.mark.parametrize(("line", "said"), BAD, ids=[said for _, said in BAD])
def test_a_bad_line_is_named_with_its_number(line: bytes, said: str) -> None:
    good = json_lines([chat("q", "a")])
    number, problems, _ = check(good + line + b"\n" + good)
    assert number == 2 and len(problems) == 1
    assert problems[0].startswith("2: ") and said in problems[0] and problems[0].endswith(".")


@pytest.mark.parametrize(("line", "said"), BAD_CALLS, ids=[said for _, said in BAD_CALLS])
def test_a_bad_call_is_named(line: bytes, said: str) -> None:
    assert [said in problem for problem in check(line, FULL)[1]] == [True]


def test_files_have_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "MAX_EXAMPLES", 3)
    monkeypatch.setattr(examples, "MAX_LINE_BYTES", 200)
    monkeypatch.setattr(examples, "MAX_PROBLEMS", 2)
    assert check(b"\n\n")[1] == ["None: The file has no examples."]
    assert check(json_lines([chat("q", "a")] * 3))[1] == []
    assert check(json_lines([chat("q", "a")] * 4))[1] == ["4: The file has more than 3 examples."]
    assert check(json_lines([chat("q" * 200, "a")]))[1] == ["1: the line is longer than 200 bytes."]
    assert len(check(b"x\n" * 9)[1]) == 2
