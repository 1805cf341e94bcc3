"""Reasoning as items of responses and as thinking of messages, over HTTP and through the official clients."""

from typing import Any

import httpx
import pytest
from anthropic import Anthropic
from openai import OpenAI

from stellarbyte_server.api.answers.messages import SIGNATURE
from tests.support.clients import anthropic_client, openai_client
from tests.support.over_http import assert_error
from tests.support.response_events import checked, events_of
from tests.support.servers.server_process import ServerProcess

MODEL = "thinker"
THOUGHT = "<think>\nHm, ok.\n</think>\n\nYes."
NUM_THOUGHTS = len("\nHm, ok.\n")
USER: dict[str, Any] = {"role": "user", "content": "q"}
TOOL = {"name": "f", "input_schema": {"type": "object"}}
CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
ENABLED = {"type": "enabled", "budget_tokens": 100}


@pytest.fixture(scope="module")
def openai(reasoning_server: ServerProcess) -> OpenAI:
    return openai_client.strict_client(reasoning_server.url)


@pytest.fixture(scope="module")
def anthropic(reasoning_server: ServerProcess) -> Anthropic:
    return anthropic_client.strict_client(reasoning_server.url)


def post(server: ServerProcess, path: str, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={"model": MODEL} | body, timeout=60)


def response(server: ServerProcess, content: Any = THOUGHT, **fields: Any) -> dict[str, Any]:
    answer = post(server, "/v1/responses", input=content, **fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def message(server: ServerProcess, content: Any = THOUGHT, **fields: Any) -> dict[str, Any]:
    fields = {"max_tokens": 100, "messages": [{"role": "user", "content": content}]} | fields
    answer = post(server, "/v1/messages", **fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def said(answer: dict[str, Any]) -> list[tuple[str, str]]:
    return [(item["type"], item["content"][0]["text"]) for item in answer["output"]]


def blocks(answer: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(block["type"], block.get(block["type"], block.get("input"))) for block in answer["content"]]


def num_tokens(server: ServerProcess, *messages: dict[str, Any], **variables: Any) -> int:
    """Of the prompt that a chat becomes."""
    body = {"messages": messages, "chat_template_kwargs": variables}
    return int(httpx.post(f"{server.url}/tokenize", json=body).json()["count"])


# Responses


def test_a_response_has_an_item_for_its_reasoning(reasoning_server, openai):
    typed = openai.responses.create(model=MODEL, input=THOUGHT)
    reasoning, text = typed.output
    assert (reasoning.type, reasoning.content[0].text, reasoning.summary) == ("reasoning", "Hm, ok.", [])
    assert (text.type, typed.output_text) == ("message", "Yes.")
    assert typed.usage.output_tokens_details.reasoning_tokens == NUM_THOUGHTS
    told = checked(events_of(post(reasoning_server, "/v1/responses", input=THOUGHT, stream=True).text))
    assert said(told) == [("reasoning", "Hm, ok."), ("message", "Yes.")]
    with openai.responses.stream(model=MODEL, input=THOUGHT) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == "Yes."
    assert "response.reasoning_text.delta" in kinds and "response.reasoning_text.done" in kinds


def test_a_response_that_is_cut_in_its_reasoning_has_only_that(reasoning_server):
    answer = response(reasoning_server, "<think>abcdef", max_output_tokens=4)
    assert (answer["status"], said(answer)) == ("incomplete", [("reasoning", "abc")])


def test_fields_of_reasoning_work_in_responses(reasoning_server):
    answer = response(reasoning_server, include_reasoning=False)
    assert said(answer) == [("message", "Yes.")]
    assert answer["usage"]["output_tokens_details"] == {"reasoning_tokens": NUM_THOUGHTS}
    answer = response(reasoning_server, "<think>abcdef", max_reasoning_tokens=3, max_output_tokens=20)
    assert said(answer)[0] == ("reasoning", "abc")
    answer = response(reasoning_server, "Hm.</think>Yes.", chat_template_kwargs={"opens": True})
    assert said(answer) == [("reasoning", "Hm."), ("message", "Yes.")]
    fields = {"chat_template_kwargs": {"mood": 1}, "reasoning": {"summary": "auto"}}
    ignored = post(reasoning_server, "/v1/responses", input="q", **fields).headers["X-Ignored-Fields"]
    assert ignored == "chat_template_kwargs.mood, reasoning.summary"
    assert_error(
        post(reasoning_server, "/v1/responses", input="q", max_reasoning_tokens=-1), 400, "max_reasoning_tokens"
    )


def test_the_effort_of_a_response_reaches_the_template(reasoning_server, fake_server):
    plain, low = response(reasoning_server, "q"), response(reasoning_server, "q", reasoning={"effort": "low"})
    assert low["usage"]["input_tokens"] - plain["usage"]["input_tokens"] == len("effort=low;")
    body = {"model": "fake", "input": "q", "max_output_tokens": 1}
    fake = httpx.post(f"{fake_server.url}/v1/responses", json=body | {"max_reasoning_tokens": 1}, timeout=60)
    assert_error(fake, 400, "max_reasoning_tokens")


def test_an_answers_items_go_back_to_the_template(reasoning_server):
    items = response(reasoning_server)["output"]
    answer = response(reasoning_server, [USER, *items, USER])
    earlier = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm, ok."}
    assert answer["usage"]["input_tokens"] == num_tokens(reasoning_server, USER, earlier, USER)
    assert num_tokens(reasoning_server, USER, earlier, USER) > num_tokens(
        reasoning_server, USER, {"role": "assistant", "content": "Yes."}, USER
    )


# Messages


def test_a_message_has_a_block_of_thinking(anthropic):
    asked = {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": THOUGHT}]}
    whole = anthropic.messages.create(**asked, thinking=ENABLED)
    thinking, text = whole.content
    assert (thinking.type, thinking.thinking, thinking.signature) == ("thinking", "Hm, ok.", SIGNATURE)
    assert (text.type, text.text) == ("text", "Yes.")
    assert whole.usage.output_tokens_details.thinking_tokens == NUM_THOUGHTS
    with anthropic.messages.stream(**asked, thinking={"type": "adaptive"}) as stream:
        kinds = [event.type for event in stream]
        assert anthropic_client.told(stream.get_final_message()) == anthropic_client.told(whole)
    assert "thinking" in kinds and "signature" in kinds


def test_thinking_comes_before_calls(reasoning_server):
    answer = message(reasoning_server, f"<think>Hm.</think>{CALL}", tools=[TOOL], thinking={"type": "adaptive"})
    assert blocks(answer) == [("thinking", "Hm."), ("tool_use", {})]
    assert answer["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("thinking", "expected"),
    [(None, []), ({"type": "adaptive", "display": "omitted"}, [("thinking", "")])],
)
def test_thinking_that_is_not_shown_counts(reasoning_server, thinking, expected):
    answer = message(reasoning_server, thinking=thinking)
    assert blocks(answer) == [*expected, ("text", "Yes.")]
    assert answer["usage"]["output_tokens_details"] == {"thinking_tokens": NUM_THOUGHTS}


def test_a_budget_bounds_the_thinking(reasoning_server):
    answer = message(reasoning_server, "<think>abcdef", thinking={"type": "enabled", "budget_tokens": 3})
    assert blocks(answer)[0] == ("thinking", "abc")
    assert answer["usage"]["output_tokens_details"] == {"thinking_tokens": 3}


def test_thinking_that_is_disabled_is_switched_off_in_the_template(reasoning_server):
    answer = post(reasoning_server, "/v1/messages", messages=[USER], max_tokens=9, thinking={"type": "disabled"})
    assert "X-Ignored-Fields" not in answer.headers
    usage = answer.json()["usage"]
    assert "output_tokens_details" not in usage
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == num_tokens(
        reasoning_server, USER, enable_thinking=False
    )


def test_a_message_that_is_cut_in_its_thinking_has_only_that(reasoning_server):
    answer = message(reasoning_server, "<think>abcdef", max_tokens=4, thinking={"type": "adaptive"})
    assert (answer["stop_reason"], blocks(answer)) == ("max_tokens", [("thinking", "abc")])
    assert message(reasoning_server, "<think>abcdef", max_tokens=4)["content"] == []


def test_counts_are_of_the_prompt_that_thinking_makes(reasoning_server):
    turns = [USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "why"}]}, USER]
    turns[1]["content"].append({"type": "text", "text": "a"})
    fields = {"messages": turns, "thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}
    counted = post(reasoning_server, "/v1/messages/count_tokens", **fields).json()["input_tokens"]
    earlier = {"role": "assistant", "content": "a", "reasoning_content": "why"}
    variables = {"enable_thinking": False, "reasoning_effort": "low"}
    assert counted == num_tokens(reasoning_server, USER, earlier, USER, **variables)
    usage = message(reasoning_server, **fields)["usage"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_a_model_that_does_not_think_says_what_had_no_effect(fake_server):
    body = {
        "model": "fake",
        "messages": [USER],
        "max_tokens": 2,
        "thinking": ENABLED,
        "output_config": {"effort": "low"},
    }
    answer = httpx.post(f"{fake_server.url}/v1/messages", json=body, timeout=60)
    assert answer.status_code == 200
    assert answer.headers["X-Ignored-Fields"] == "thinking, output_config.effort"
    assert "output_tokens_details" not in answer.json()["usage"]
    off = body | {"thinking": {"type": "disabled"}, "output_config": {}}
    assert "X-Ignored-Fields" not in httpx.post(f"{fake_server.url}/v1/messages", json=off, timeout=60).headers
