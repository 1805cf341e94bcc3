"""Reasoning over HTTP: the server before an engine core whose model repeats the last message, marks included."""

import json
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.support.clients.openai_client import strict_client
from tests.support.engines.reasoning_engine import END_MARK, START
from tests.support.over_http import assert_error
from tests.support.servers.server_process import ServerProcess

MODEL = "thinker"
THOUGHT = "<think>\nHm, ok.\n</think>\n\nYes."


@pytest.fixture(scope="module")
def server(reasoning_server: ServerProcess) -> ServerProcess:
    return reasoning_server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> OpenAI:
    return strict_client(server.url)


def post(server: ServerProcess, content: str = THOUGHT, path: str = "/v1/chat/completions", **fields: Any) -> Any:
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}]} | fields
    return httpx.post(server.url + path, json=body, timeout=60)


def ask(server: ServerProcess, content: str = THOUGHT, **fields: Any) -> dict[str, Any]:
    answer = post(server, content, **fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def message(answer: dict[str, Any]) -> tuple[str | None, str | None]:
    """Its reasoning and its content."""
    said = answer["choices"][0]["message"]
    assert said.get("reasoning") == said.get("reasoning_content")
    return said.get("reasoning_content"), said["content"]


def stream(server: ServerProcess, content: str = THOUGHT, **fields: Any) -> list[dict[str, Any]]:
    lines = post(server, content, stream=True, stream_options={"include_usage": True}, **fields).text.splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(text) for text in events[:-1]]


def prompt(server: ServerProcess, messages: list[dict[str, Any]], **fields: Any) -> str:
    """The prompt that a chat becomes."""
    tokens = httpx.post(f"{server.url}/tokenize", json={"messages": messages} | fields).json()["tokens"]
    return str(httpx.post(f"{server.url}/detokenize", json={"model": MODEL, "tokens": tokens}).json()["prompt"])


def test_a_message_has_its_reasoning_apart_and_usage_counts_it(server, client):
    answer = ask(server)
    assert message(answer) == ("Hm, ok.", "Yes.")
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": len("\nHm, ok.\n")}
    assert answer["usage"]["completion_tokens"] == len("\nHm, ok.\n\n\nYes.") + 3  # both marks and the end
    typed = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": THOUGHT}])
    assert typed.choices[0].message.content == "Yes."
    assert typed.choices[0].message.reasoning_content == "Hm, ok."


@pytest.mark.parametrize("n", [1, 3])
def test_streams_say_what_whole_answers_say(server, n):
    *chunks, last = stream(server, n=n)
    for index in range(n):
        deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"][0]["index"] == index]
        for name in ("reasoning", "reasoning_content"):
            assert "".join(delta.get(name, "") for delta in deltas) == "Hm, ok."
        assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
    assert last["usage"]["completion_tokens_details"] == {"reasoning_tokens": n * len("\nHm, ok.\n")}


def test_reasoning_that_the_prompt_opens_needs_no_start_mark(server):
    answer = ask(server, "Hm.</think>Yes.", chat_template_kwargs={"opens": True})
    assert message(answer) == ("Hm.", "Yes.")


def test_an_answer_that_is_cut_while_it_reasons_has_no_content(server):
    answer = ask(server, max_tokens=4)
    assert message(answer) == ("Hm,"[:2], None)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}


def test_the_reasoning_may_be_left_out_and_counts(server):
    answer = ask(server, include_reasoning=False)
    assert message(answer) == (None, "Yes.")
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 9}
    deltas = [chunk["choices"][0]["delta"] for chunk in stream(server, include_reasoning=False)[:-1]]
    assert not any("reasoning" in delta for delta in deltas)


def test_the_reasoning_can_be_bounded(server):
    answer = ask(server, "<think>abcdef", max_reasoning_tokens=3, return_token_ids=True, ignore_eos=True, max_tokens=6)
    assert message(answer)[0] == "abc"
    assert answer["choices"][0]["token_ids"][:5] == [START, *b"abc", END_MARK]
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}


def test_a_schema_and_log_probabilities_are_of_the_answer_only(server):
    schema = {"type": "object", "properties": {"n": {"const": 7}}, "required": ["n"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    answer = ask(server, '<think>{"n": 8}</think>x"n": 7}', response_format=wanted, logprobs=True)
    assert message(answer)[0] == '{"n": 8}'
    assert json.loads(message(answer)[1] or "") == {"n": 7}
    tokens = [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]]
    assert "".join(tokens) == message(answer)[1]


def test_stop_strings_do_not_end_the_reasoning(server):
    answer = ask(server, "<think>a. b</think>c. d", stop=["."])
    assert message(answer) == ("a. b", "c")


def test_tool_calls_come_after_the_reasoning(server):
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    answer = ask(server, f"<think>{call}</think>\n\n{call}", tools=tools)
    (found,) = answer["choices"][0]["message"]["tool_calls"]
    assert found["function"] == {"name": "f", "arguments": "{}"}
    assert message(answer) == (call, None)
    assert answer["choices"][0]["finish_reason"] == "tool_calls"


def test_earlier_reasoning_goes_back_to_the_template(server):
    question = {"role": "user", "content": "q"}
    for fields in ({"reasoning_content": "why"}, {"reasoning": "why"}, {"reasoning": "no", "reasoning_content": "why"}):
        shown = prompt(server, [question, {"role": "assistant", "content": "a", **fields}, question])
        assert "assistant\n<think>\nwhy\n</think>\n\na<" in shown


def test_effort_and_variables_reach_a_template_that_reads_them(server):
    answer = post(server, reasoning_effort="low", return_token_ids=True)
    assert "X-Ignored-Fields" not in answer.headers
    assert bytes(answer.json()["prompt_token_ids"][:11]) == b"effort=low;"
    answer = post(server, "Yes.", reasoning_effort="none")
    assert message(answer.json()) == (None, "Yes.")
    assert "completion_tokens_details" not in answer.json()["usage"]
    shown = prompt(server, [{"role": "user", "content": "q"}], chat_template_kwargs={"enable_thinking": False})
    assert shown.endswith("<think>\n\n</think>\n\n")


def test_variables_that_the_template_does_not_read_are_named(server):
    answer = post(server, chat_template_kwargs={"enable_thinking": True, "mood": 1})
    assert answer.status_code == 200
    assert answer.headers["X-Ignored-Fields"] == "chat_template_kwargs.mood"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"raise_exception": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"__class__": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"enable_thinking": "x" * 20_000}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {f"v{i}": 1 for i in range(65)}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"max_reasoning_tokens": -1}, "max_reasoning_tokens"),
        ({"include_reasoning": 1}, "include_reasoning"),
        ({"messages": [{"role": "user", "content": "q", "reasoning": "why"}]}, "messages[0]"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(server, fields, param):
    assert_error(post(server, **fields), 400, param)


def test_a_model_without_marks_takes_an_effort_and_no_bound(fake_server):
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    url = f"{fake_server.url}/v1/chat/completions"
    answer = httpx.post(url, json=body | {"reasoning_effort": "high"}, timeout=30)
    assert (answer.status_code, answer.headers["X-Ignored-Fields"]) == (200, "reasoning_effort")
    assert "completion_tokens_details" not in answer.json()["usage"]
    assert "X-Ignored-Fields" not in httpx.post(url, json=body | {"reasoning_effort": "none"}, timeout=30).headers
    assert_error(httpx.post(url, json=body | {"max_reasoning_tokens": 5}), 400, "max_reasoning_tokens")


def test_completions_are_as_they_were(server):
    body = {"model": MODEL, "prompt": THOUGHT, "max_tokens": 100}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["text"] == THOUGHT
    assert "completion_tokens_details" not in answer["usage"]
