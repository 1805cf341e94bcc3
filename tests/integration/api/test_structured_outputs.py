"""vLLM's `structured_outputs` and `guided_` fields, schemas that are not strict, and what a client hears of them."""

import json
import re

import httpx
import pytest

from tests.support.clients.openai_client import QUESTION
from tests.support.over_http import assert_error

PAIR = {"type": "array", "prefixItems": [{"const": 1}, {"const": 1}], "minItems": 2, "maxItems": 2}
SAME_TWICE = PAIR | {"items": False, "uniqueItems": True}  # whatever is written breaks it
PERSON = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99, "format": "uint8"}}}
PERSON |= {"required": ["age"], "additionalProperties": False}


def ask(server, path: str, **fields) -> httpx.Response:
    (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    asked = {"messages": QUESTION} if path == "chat/completions" else {"prompt": "The sky is"}
    fields = {"model": model["id"], "temperature": 0, "max_tokens": 40} | asked | fields
    return httpx.post(f"{server.url}/v1/{path}", json=fields, timeout=60)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "stop" and "schema_violation" not in choice
    return choice["text"] if "text" in choice else choice["message"]["content"]


def is_person(text: str) -> bool:
    value = json.loads(text)
    return value.keys() == {"age"} and 0 <= value["age"] <= 99


WANTED = [
    ("json", PERSON, is_person),
    ("json", json.dumps(PERSON), is_person),
    ("regex", "[a-c]{2}/\\d", re.compile("[a-c]{2}/[0-9]").fullmatch),
    ("choice", ["over the sea", "under the tree"], ["over the sea", "under the tree"].__contains__),
    ("grammar", 'root ::= "<" [xy] ">"', {"<x>", "<y>"}.__contains__),
]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("kind, value, is_right", WANTED)
def test_an_answer_has_the_form_that_is_asked_for(demo_server, path, kind, value, is_right) -> None:
    assert is_right(text_of(ask(demo_server, path, structured_outputs={kind: value})))
    assert is_right(text_of(ask(demo_server, path, **{f"guided_{kind}": value})))


def test_any_json_object(demo_server) -> None:
    fields = {"structured_outputs": {"json_object": True}, "stop": "}", "include_stop_str_in_output": True}
    answer = ask(demo_server, "completions", max_tokens=4, **fields).json()
    assert answer["choices"][0]["text"].startswith("{")


@pytest.mark.parametrize(
    "fields, param, why",
    [
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex", "look-around"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        ({"structured_outputs": {"json": "no"}}, "structured_outputs.json", "JSON schema"),
        ({"structured_outputs": {"json": {"type": "strnig"}}}, "structured_outputs.json", "strnig"),
        (
            {"structured_outputs": {"json_object": True, "structural_tag": "a"}},
            "structured_outputs.structural_tag",
            "not supported",
        ),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar", "nothing"),
        ({"guided_choice": ["a"] * 1001}, "guided_choice", "at most 1000"),
        ({"guided_grammar": 'start: %json {"type": "null"}'}, "guided_grammar", "%json"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "guided_regex"),
        ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend", "not supported"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(fake_server, fields, param, why) -> None:
    for path in ("completions", "chat/completions"):
        assert why in assert_error(ask(fake_server, path, **fields), 400, param)["message"]


def test_it_can_be_combined_with_what_it_fits(fake_server) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    both = {"response_format": {"type": "json_object"}, "guided_regex": "a"}
    assert_error(ask(fake_server, "chat/completions", **both), 400, "guided_regex")
    assert_error(ask(fake_server, "chat/completions", tools=tools, guided_regex="a"), 400, "guided_regex")
    begun = {"continue_final_message": True, "messages": [*QUESTION, {"role": "assistant", "content": "a"}]}
    assert_error(ask(fake_server, "chat/completions", guided_regex="a", **begun), 400, "continue_final_message")
    fine = ask(fake_server, "chat/completions", tools=tools, tool_choice="none", guided_regex="a", max_tokens=1)
    assert fine.status_code == 200


def test_a_finished_answer_that_breaks_its_schema_says_so(demo_server) -> None:
    """Streamed or not, of a completion and of a chat; and not with `strict`, which refuses the schema."""
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SAME_TWICE}}
    for path, fields in (("completions", {"guided_json": SAME_TWICE}), ("chat/completions", {"response_format": form})):
        (choice,) = ask(demo_server, path, **fields).json()["choices"]
        assert "[1, 1]" in json.dumps(choice) and "'uniqueItems'" in choice["schema_violation"]
        stream = ask(demo_server, path, **fields, stream=True).text.split("\n\n")
        *parts, last = [json.loads(event[6:])["choices"][0] for event in stream if event.startswith("data: {")]
        assert last["finish_reason"] == "stop" and last["schema_violation"] == choice["schema_violation"]
        assert all("schema_violation" not in part for part in parts)
    cut = ask(demo_server, "completions", guided_json=SAME_TWICE, max_tokens=1).json()["choices"][0]
    assert cut["finish_reason"] == "length" and "schema_violation" not in cut
    held = {"type": "json_schema", "json_schema": {"name": "a", "schema": SAME_TWICE, "strict": True}}
    error = assert_error(ask(demo_server, "chat/completions", response_format=held), 400, "response_format")
    assert "'uniqueItems'" in error["message"]


def test_a_call_that_breaks_its_tools_schema_says_so(demo_server) -> None:
    parameters = {"type": "object", "properties": {"pair": SAME_TWICE}, "required": ["pair"]}
    parameters |= {"additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    answer = ask(demo_server, "chat/completions", tools=tools, tool_choice="required", parallel_tool_calls=False)
    (choice,) = answer.json()["choices"]
    assert choice["schema_violation"].startswith("The call of f violates") and "$.pair" in choice["schema_violation"]
    tools[0]["function"]["strict"] = True
    assert_error(ask(demo_server, "chat/completions", tools=tools), 400, "tools[0].function.parameters")


def test_responses_and_messages_say_so_too(demo_server) -> None:
    (model,) = httpx.get(f"{demo_server.url}/v1/models").json()["data"]
    schema = {"type": "json_schema", "schema": SAME_TWICE}
    common = {"model": model["id"], "temperature": 0}
    response = common | {"input": QUESTION, "max_output_tokens": 40, "text": {"format": schema | {"name": "a"}}}
    message = common | {"messages": QUESTION, "max_tokens": 40, "output_config": {"format": schema}}
    for path, body in (("responses", response), ("messages", message)):
        whole = httpx.post(f"{demo_server.url}/v1/{path}", json=body, timeout=60).json()
        assert "'uniqueItems'" in whole["schema_violation"], whole
        streamed = httpx.post(f"{demo_server.url}/v1/{path}", json=body | {"stream": True}, timeout=60).text
        events = [json.loads(line[6:]) for line in streamed.split("\n") if line.startswith("data: ")]
        (last,) = [event for event in events if event["type"] in ("response.completed", "message_delta")]
        assert last["response" if path == "responses" else "delta"]["schema_violation"] == whole["schema_violation"]


def test_every_event_tells_the_usage_so_far(fake_server) -> None:
    for path in ("completions", "chat/completions"):
        options = {"include_usage": True, "continuous_usage_stats": True}
        stream = ask(fake_server, path, stream=True, stream_options=options, max_tokens=5, n=2).text
        events = [json.loads(event[6:]) for event in stream.split("\n\n") if event.startswith("data: {")]
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts) and counts[-1] == 10
        assert events[-1]["choices"] == []
        for event in events:
            usage = event["usage"]
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        quiet = ask(fake_server, path, stream=True, stream_options={"continuous_usage_stats": True}).text
        assert '"usage"' not in quiet


def test_up_to_32_stop_strings(fake_server) -> None:
    stops = [f"stop {number}" for number in range(31)]
    answer = ask(fake_server, "completions", stop=[*stops, "sky"])
    assert answer.json()["choices"][0]["text"] == "The "
    assert_error(ask(fake_server, "completions", stop=[*stops, "a", "b"]), 400, "stop")


def test_the_likeliest_token_is_taken_with_a_top_p_of_0(demo_server) -> None:
    greedy = ask(demo_server, "completions", max_tokens=8).json()["choices"][0]["text"]
    for seed in range(3):
        answer = ask(demo_server, "completions", temperature=1.5, top_p=0, seed=seed, max_tokens=8)
        assert answer.json()["choices"][0]["text"] == greedy
