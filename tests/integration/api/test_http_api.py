"""The HTTP contract over a real socket: answers, streams, errors and routes, with an engine that repeats prompts."""

import json
import socket
import time

import httpx
import pytest

from tests.support.over_http import assert_error
from tests.support.servers.fake_engine import MAX_MODEL_LEN, REJECT
from tests.support.servers.server_process import FAKE, ServerProcess, running
from tests.support.servers.server_process import FAKE_MODEL as MODEL

QUESTION = [{"role": "user", "content": "hé"}]
TOOL = {"type": "function", "function": {"name": "get"}}


def complete(server: ServerProcess, **fields) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json={"model": MODEL, "prompt": "ab"} | fields, timeout=30)


def chat(server: ServerProcess, **fields) -> httpx.Response:
    body = {"model": MODEL, "messages": QUESTION} | fields
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)


def events(response: httpx.Response) -> list:
    """The JSON of every event; the last one, [DONE], as that text."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    found = []
    for block in response.text[:-2].split("\n\n"):
        assert block.startswith("data: ")
        found.append(block[6:] if block == "data: [DONE]" else json.loads(block[6:]))
    return found


def test_a_completion_has_the_text_usage_and_identity(fake_server):
    answer = complete(fake_server, max_tokens=5).json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == MODEL
    assert answer["system_fingerprint"] == "fp_0123456789ab_float32"
    choice = {"index": 0, "text": "ababa", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    assert answer["choices"] == [choice]
    assert answer["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 5,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_completions_default_to_sixteen_tokens(fake_server):
    assert complete(fake_server).json()["usage"]["completion_tokens"] == 16


def test_token_ids_are_a_prompt(fake_server):
    assert complete(fake_server, prompt=[104, 105], max_tokens=4).json()["choices"][0]["text"] == "hihi"


def test_a_stop_string_ends_the_answer_before_it(fake_server):
    choice = complete(fake_server, prompt="one two ", stop=["two", "x"], max_tokens=50).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("one ", "stop")


def test_a_chat_runs_to_the_end_of_the_context(fake_server):
    answer = chat(fake_server).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"].startswith("user\nhé\nassistant\nuser\nhé")
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == MAX_MODEL_LEN


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_chat_may_be_shorter_and_is_clamped_when_longer(fake_server, name):
    assert chat(fake_server, **{name: 3}).json()["usage"]["completion_tokens"] == 3
    assert chat(fake_server, **{name: 10**9}).json()["usage"]["total_tokens"] == MAX_MODEL_LEN


def test_a_chat_that_slides_has_no_end_of_context_but_a_default_length(fake_server):
    assert chat(fake_server, context_overflow="slide").json()["usage"]["completion_tokens"] == 4096
    longer = MAX_MODEL_LEN + 100
    answer = chat(fake_server, context_overflow="slide", max_tokens=longer).json()
    assert answer["usage"]["completion_tokens"] == longer


@pytest.mark.parametrize("send", [complete, chat])
def test_a_stream_carries_the_same_text_in_the_form_of_the_contract(fake_server, send):
    whole = send(fake_server, max_tokens=40).json()
    *chunks, usage, done = events(send(fake_server, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]"
    constant = ("id", "object", "created", "model", "system_fingerprint")
    assert len({tuple(chunk[name] for name in constant) for chunk in [*chunks, usage]}) == 1
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    assert choices[-1]["finish_reason"] == "length"
    if send is chat:
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in choices[1:])
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        assert text == whole["choices"][0]["message"]["content"]
    else:
        assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]


def test_without_include_usage_no_chunk_has_usage(fake_server):
    *chunks, done = events(complete(fake_server, stream=True))
    assert done == "[DONE]"
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("stream", [True, False])
def test_what_the_engine_refuses_is_refused_before_any_header_of_a_stream(fake_server, stream):
    error = assert_error(complete(fake_server, prompt=REJECT, stream=stream), 400, "prompt", "unwanted")
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": ""}, "prompt", None),
        ({"prompt": "x" * MAX_MODEL_LEN}, "prompt", "context_length_exceeded"),
        ({"max_tokens": MAX_MODEL_LEN}, "max_tokens", "context_length_exceeded"),
        ({"prompt": [1, 259]}, "prompt", None),
        ({"prompt": [-1]}, "prompt", None),
        ({"prompt": [10**30]}, "prompt", None),
        ({"no_such_field": 1}, "no_such_field", None),
    ],
)
def test_a_completion_that_cannot_run_is_refused(fake_server, fields, param, code):
    assert_error(complete(fake_server, **fields), 400, param, code)


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("completions", {"n": 2, "max_tokens": 2**19 + 1}, "max_tokens"),
        ("completions", {"prompt": ["a"] * 129}, "prompt"),
        ("completions", {"logprobs": 1, "max_tokens": 2**19 + 1}, "max_tokens"),
        ("completions", {"prompt": [97] * 8193, "n": 128, "max_tokens": 1}, "n"),
        ("completions", {"best_of": 2, "n": 3}, "best_of"),
        ("completions", {"best_of": 3, "n": 2, "stream": True}, "best_of"),
        ("completions", {"max_tokens": 0}, "max_tokens"),
        ("completions", {"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ("completions", {"logit_bias": {"300": 1}}, "logit_bias"),
        ("completions", {"stop_token_ids": [300]}, "stop_token_ids"),
        ("embeddings", {"input": ["a"] * 2049}, "input"),
        ("embeddings", {"input": "a", "dimensions": 3}, "dimensions"),
        ("responses", {"input": "a", "top_logprobs": 5}, "top_logprobs"),
        ("responses", {"input": "a", "previous_response_id": "r"}, "previous_response_id"),
        ("chat/completions", {"messages": QUESTION, "tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ("chat/completions", {"messages": QUESTION, "continue_final_message": True}, "continue_final_message"),
        ("chat/completions", {"messages": QUESTION, "top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {"messages": QUESTION, "stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_asks_for_too_much_or_contradicts_itself_is_refused_by_name(fake_server, route, fields, param):
    slides = {"prompt": "a", "context_overflow": "slide"} if route == "completions" else {}
    response = httpx.post(f"{fake_server.url}/v1/{route}", json={"model": MODEL} | slides | fields)
    assert_error(response, 400, param)


def test_a_chat_that_cannot_run_is_refused(fake_server):
    long = [{"role": "user", "content": "x" * MAX_MODEL_LEN}]
    assert_error(chat(fake_server, messages=long), 400, "messages", "context_length_exceeded")
    assert_error(chat(fake_server, max_tokens=1, max_completion_tokens=2), 400, "max_tokens")


@pytest.mark.parametrize("send", [complete, chat])
def test_another_model_does_not_exist(fake_server, send):
    error = assert_error(send(fake_server, model="gpt-9"), 404, "model", "model_not_found")
    assert error["type"] == "not_found_error"


def test_a_body_that_is_no_json_is_refused(fake_server):
    assert_error(httpx.post(f"{fake_server.url}/v1/completions", content=b"{"), 400)


def test_a_body_too_large_is_refused_declared_or_not(fake_server):
    url = f"{fake_server.url}/v1/completions"
    error = assert_error(httpx.post(url, content=b"x" * 100_001), 413, code="request_too_large")
    assert error["type"] == "request_too_large"
    pieces = (b"x" * 1000 for _ in range(200))
    assert_error(httpx.post(url, content=pieces), 413, code="request_too_large")


def test_unknown_routes_and_methods_are_errors_of_the_same_form(fake_server):
    assert_error(httpx.get(f"{fake_server.url}/v2/nothing"), 404)
    assert_error(httpx.get(f"{fake_server.url}/v1/models/"), 404, "model", "model_not_found")
    response = httpx.get(f"{fake_server.url}/v1/completions")
    assert_error(response, 405)
    assert response.headers["allow"] == "POST"


def test_models_are_listed_with_their_limits(fake_server):
    (card,) = httpx.get(f"{fake_server.url}/v1/models").json()["data"]
    assert card == httpx.get(f"{fake_server.url}/v1/models/{MODEL}").json()
    assert (card["id"], card["max_model_len"], card["parent"]) == (MODEL, MAX_MODEL_LEN, None)
    assert len(card["content_hash"]) == 64
    assert_error(httpx.get(f"{fake_server.url}/v1/models/a/b"), 404, "model", "model_not_found")


def test_the_server_says_how_it_is(fake_server):
    assert httpx.get(f"{fake_server.url}/health").status_code == 200
    assert httpx.get(f"{fake_server.url}/ready").status_code == 200
    assert httpx.get(f"{fake_server.url}/version").json().keys() == {"version"}


def test_metrics_count_tokens_under_the_models_name(fake_server):
    before = fake_server.metric("vllm:generation_tokens_total")
    prompts = fake_server.metric("vllm:prompt_tokens_total")
    complete(fake_server, prompt="abc", max_tokens=7)
    assert fake_server.metric("vllm:generation_tokens_total") == before + 7
    assert fake_server.metric("vllm:prompt_tokens_total") == prompts + 3
    assert f'vllm:num_requests_running{{model_name="{MODEL}"}}' in httpx.get(f"{fake_server.url}/metrics").text


def test_each_request_is_logged_without_its_prompt(fake_server):
    response = complete(fake_server, prompt="a secret", max_tokens=3)
    deadline_s = time.monotonic() + 60
    while response.headers["x-request-id"] not in fake_server.log() and time.monotonic() < deadline_s:
        time.sleep(0.05)  # it is written after the answer has gone out
    (line,) = [line for line in fake_server.log().splitlines() if response.headers["x-request-id"] in line]
    assert "POST /v1/completions 200" in line
    assert " prompt_tokens=8 completion_tokens=3 finish_reason=length queue_s=0" in line
    assert "secret" not in fake_server.log()


def test_bytes_that_are_no_http_do_not_hurt(fake_server):
    with socket.create_connection(("127.0.0.1", fake_server.port)) as connection:
        connection.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")
    assert httpx.get(f"{fake_server.url}/health").status_code == 200


def test_ignored_fields_are_named_in_a_header_when_asked_to_warn(fake_model):
    with running(FAKE, "--model", fake_model, "--unknown-fields", "warn") as server:
        response = complete(server, mood="good", max_tokens=2)
        assert response.json()["choices"][0]["text"] == "ab"
        assert response.headers["x-ignored-fields"] == "mood"
        assert complete(server, **{"a\r\nb": 1}).headers["x-ignored-fields"] == "a%0D%0Ab"
