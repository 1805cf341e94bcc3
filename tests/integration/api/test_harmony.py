"""Messages in channels over HTTP: the server before an engine core whose model writes the last message as its own."""

import json
from typing import Any

import httpx
import pytest
from anthropic import Anthropic
from openai import OpenAI

from tests.support.clients import anthropic_client, openai_client
from tests.support.over_http import assert_error
from tests.support.response_events import checked, events_of
from tests.support.servers.harmony_server import make_model_folder
from tests.support.servers.server_process import HARMONY, ServerProcess, running

MODEL = "oss"
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
NEXT = "<|end|><|start|>assistant"
THOUGHT = f"{ANALYSIS}Hm, ok.{NEXT}{FINAL}Yes."
ARGUMENTS = '{"city": "São"}'
CALL = f"<|channel|>commentary to=functions.get <|constrain|>json<|message|>{ARGUMENTS}"
CALLED = f"{ANALYSIS}Hm.{NEXT}<|channel|>commentary<|message|>I look.{NEXT}{CALL}<|call|>"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"const": "São"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def server(harmony_server: ServerProcess) -> ServerProcess:
    return harmony_server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> OpenAI:
    return openai_client.strict_client(server.url)


@pytest.fixture(scope="module")
def anthropic(server: ServerProcess) -> Anthropic:
    return anthropic_client.strict_client(server.url)


def post(
    server: ServerProcess, content: str = THOUGHT, path: str = "/v1/chat/completions", **fields: Any
) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}]} | fields
    return httpx.post(server.url + path, json=body, timeout=60)


def choice(server: ServerProcess, content: str = THOUGHT, **fields: Any) -> dict[str, Any]:
    answer = post(server, content, **fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["choices"][0])


def told(choice: dict[str, Any]) -> tuple[str | None, str | None, list[tuple[str, str]], str]:
    """Reasoning, content, calls, and why it ended."""
    message = choice["message"]
    assert message.get("reasoning") == message.get("reasoning_content")
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return message.get("reasoning_content"), message["content"], calls, choice["finish_reason"]


def prompt(server: ServerProcess, *messages: dict[str, Any], **fields: Any) -> str:
    tokens = httpx.post(f"{server.url}/tokenize", json={"messages": messages} | fields).json()["tokens"]
    return str(httpx.post(f"{server.url}/detokenize", json={"model": MODEL, "tokens": tokens}).json()["prompt"])


def test_analysis_is_reasoning_and_final_is_content(server, client):
    assert told(choice(server)) == ("Hm, ok.", "Yes.", [], "stop")
    typed = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": THOUGHT}])
    assert typed.choices[0].message.content == "Yes."
    assert typed.usage.completion_tokens_details.reasoning_tokens == len("Hm, ok.")
    assert told(choice(server, include_reasoning=False)) == (None, "Yes.", [], "stop")


def test_an_answer_that_is_cut_in_a_header_has_no_part_of_it(server):
    for max_tokens, reasoning in ((5, None), (11, "H"), (17, "Hm, ok."), (30, "Hm, ok.")):
        cut = choice(server, max_tokens=max_tokens)
        assert told(cut)[0] == reasoning and not cut["message"]["content"]
        assert cut["finish_reason"] == "length"


@pytest.mark.parametrize(("content", "fields"), [(THOUGHT, {}), (CALLED, {"tools": [TOOL]})])
def test_streams_say_what_whole_answers_say(server, content, fields):
    lines = post(server, content, stream=True, **fields).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    deltas = [event["choices"][0]["delta"] for event in events]
    reasoning, said, calls, end = told(choice(server, content, **fields))
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == reasoning
    assert "".join(delta.get("content") or "" for delta in deltas) == said
    parts = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [part["function"]["name"] for part in parts if "id" in part] == [name for name, _ in calls]
    assert "".join(part["function"]["arguments"] for part in parts) == "".join(text for _, text in calls)
    assert events[-1]["choices"][0]["finish_reason"] == end


def test_commentary_to_a_tool_is_its_call_and_other_commentary_content(server):
    assert told(choice(server, CALLED, tools=[TOOL])) == ("Hm.", "I look.", [("get", ARGUMENTS)], "tool_calls")
    in_role = f" to=functions.get<|channel|>commentary json<|message|>{ARGUMENTS}"
    assert told(choice(server, in_role, tools=[TOOL])) == (None, None, [("get", ARGUMENTS)], "tool_calls")
    assert told(choice(server, THOUGHT, tools=[TOOL])) == ("Hm, ok.", "Yes.", [], "stop")
    required = choice(server, f"{ANALYSIS}Hm.{NEXT}{CALL}", tools=[TOOL], tool_choice="required")
    assert told(required) == ("Hm.", None, [("get", ARGUMENTS)], "tool_calls")


def test_a_call_of_a_custom_tool_has_its_input(server):
    call = '<|channel|>commentary to=functions.run json<|message|>{"input": "1 + 1"}'
    found = choice(server, call, tools=[{"type": "custom", "custom": {"name": "run"}}])
    assert found["message"]["tool_calls"][0]["custom"] == {"name": "run", "input": "1 + 1"}


def test_calls_and_results_go_back_to_the_template(server):
    message = choice(server, CALLED, tools=[TOOL])["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "rain"}
    shown = prompt(server, {"role": "user", "content": "q"}, message, result, tools=[TOOL])
    assert "<|channel|>analysis<|message|>Hm.\nI look.<|end|><|start|>assistant to=functions.get<|channel|>" in shown
    assert f"<|message|>{ARGUMENTS}<|call|>" in shown and shown.endswith('"rain"<|end|><|start|>assistant')


@pytest.mark.parametrize(
    "wanted",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
        {"guided_regex": r'\{"city": "S.o"\}'},
        {"structured_outputs": {"grammar": 'start: "{" NAME ": " NAME "}"\nNAME: /"[a-zã]*"/i'}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}, "tools": [TOOL]},
    ],
)
def test_structured_output_is_of_the_final_text_only(server, wanted):
    said = told(choice(server, f"{ANALYSIS}{{no}}{NEXT}{FINAL}{ARGUMENTS}", **wanted))
    assert said == ("{no}", ARGUMENTS, [], "stop")
    # An x is not sampled where the text begins.
    assert told(choice(server, f"{FINAL}x{ARGUMENTS[1:]}", max_tokens=50, **wanted))[1].startswith("{")


def test_stop_strings_and_bounds_of_reasoning(server):
    assert told(choice(server, f"{ANALYSIS}a. b{NEXT}{FINAL}c. d", stop=["."])) == ("a. b", "c", [], "stop")
    cut = choice(server, f"{ANALYSIS}abc{NEXT}{FINAL}d", max_reasoning_tokens=3)
    assert told(cut) == ("abc", "d", [], "stop")
    answer = post(server, f"{FINAL}d", reasoning_effort="none", return_token_ids=True)
    assert "X-Ignored-Fields" not in answer.headers
    shown = httpx.post(f"{server.url}/detokenize", json={"model": MODEL, "tokens": answer.json()["prompt_token_ids"]})
    assert shown.json()["prompt"].startswith("<|start|>system<|message|>Reasoning: low<|end|>")
    reasoning, *_ = told(choice(server, f"{ANALYSIS}abc", reasoning_effort="none", max_tokens=40))
    assert reasoning is None


def test_log_probabilities_are_those_of_the_content(server):
    found = choice(server, logprobs=True)
    assert "".join(entry["token"] for entry in found["logprobs"]["content"]) == "Yes."


def test_a_final_message_is_continued(server):
    messages = [{"role": "user", "content": "and more."}, {"role": "assistant", "content": "Yes, "}]
    fields = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    for more in ({}, {"tools": [TOOL]}):
        assert told(choice(server, **fields, **more)) == (None, "and more.", [], "stop")
    assert_error(post(server, **fields, tools=[TOOL], tool_choice="required"), 400, "continue_final_message")


def test_marks_may_be_left_in_a_prompt_of_completions(server):
    body = {"model": MODEL, "prompt": f"<|start|>user<|message|>{THOUGHT}", "max_tokens": 100}
    text = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    assert "analysis" in text and "<|" not in text


@pytest.mark.slow
def test_without_a_parser_channels_are_text_and_calls_are_refused(tmp_path):
    with running(HARMONY, "--model", str(make_model_folder(tmp_path / "oss")), "--reasoning-parser", "none") as server:
        assert told(choice(server)) == (None, "analysisHm, ok.assistantfinalYes.", [], "stop")
        assert_error(post(server, tools=[TOOL]), 400, "tools")
        assert told(choice(server, f"{FINAL}a", tools=[TOOL], tool_choice="none")) == (None, "finala", [], "stop")


def test_responses_have_items_for_reasoning_text_and_calls(server, client):
    function = {"type": "function", "name": "get", "parameters": SCHEMA}
    body = {"model": MODEL, "input": CALLED, "tools": [function]}
    whole = httpx.post(f"{server.url}/v1/responses", json=body, timeout=60).json()
    streamed = checked(
        events_of(httpx.post(f"{server.url}/v1/responses", json=body | {"stream": True}, timeout=60).text)
    )
    for told_of in (whole, streamed):
        reasoning, text, call = told_of["output"]
        assert reasoning["content"][0]["text"] == "Hm."
        assert text["content"][0]["text"] == "I look."
        assert (call["name"], call["arguments"]) == ("get", ARGUMENTS)
    typed = client.responses.create(model=MODEL, input=THOUGHT)
    assert typed.output_text == "Yes."


def test_messages_have_blocks_for_thinking_text_and_tools(anthropic):
    answer = anthropic.messages.create(
        model=MODEL,
        max_tokens=200,
        messages=[{"role": "user", "content": CALLED}],
        thinking={"type": "enabled", "budget_tokens": 1024},
        tools=[{"name": "get", "input_schema": SCHEMA}],
    )
    thinking, text, call = answer.content
    assert (thinking.thinking, text.text, call.name, call.input) == ("Hm.", "I look.", "get", {"city": "São"})
    assert answer.stop_reason == "tool_use"
