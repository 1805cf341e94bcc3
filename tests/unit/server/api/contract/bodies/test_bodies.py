"""Request bodies: every field is used, asks for nothing, or is refused by name."""

import json
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as responses_params

from stellarbyte_server.api.contract.bodies.body import parse_body
from stellarbyte_server.api.contract.bodies.chat import ChatBody
from stellarbyte_server.api.contract.bodies.completion import CompletionBody
from stellarbyte_server.api.contract.bodies.responses.body import ResponsesBody
from stellarbyte_server.api.contract.bodies.unused import ServiceTier
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.routes.embeddings import EmbeddingsBody

COMPLETION = {"model": "m", "prompt": "hi"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def completion(**fields):
    return parse_body(CompletionBody, json.dumps(COMPLETION | fields).encode(), warn_unknown=False)[0]


def chat(**fields):
    return parse_body(ChatBody, json.dumps(CHAT | fields).encode(), warn_unknown=False)[0]


def refusal(body_class, content: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_body(body_class, content, warn_unknown=False)
    error = caught.value
    assert error.status == 400
    assert error.content()["error"]["type"] == "invalid_request_error"
    assert "\n" not in str(error)
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "0.5"),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", True),
        ("top_p", -0.01),
        ("top_p", 1.01),
        ("top_k", 1.5),
        ("top_k", -2),
        ("min_p", 2),
        ("max_tokens", 10**400),
        ("seed", 2**64),
        ("seed", "one"),
        ("stop", [str(number) for number in range(33)]),
        ("stop", [1]),
        ("stop", ""),
        ("stop", ["x" * 5000]),
        ("priority", 101),
        ("priority", "high"),
        ("cache_salt", ""),
        ("cache_salt", 5),
        ("context_overflow", "wrap"),
        ("stream", "yes"),
        ("stream_options", 1),
        ("prompt", {}),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", [1, "a"]),
        ("prompt", [True]),
        ("model", 7),
        ("suffix", "end"),
        ("prompt", ["a", [1]]),
        ("prompt", ["a", 1]),
        ("prompt", [[1], "a"]),
        ("prompt", [[1], []]),
        ("prompt", [[1], [[2]]]),
        ("max_tokens", -1),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("best_of", 0),
        ("best_of", 129),
        ("logprobs", 6),
        ("logprobs", -1),
        ("logprobs", True),
        ("echo", 1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1000),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"one": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"٣": 1}),
        ("logit_bias", [1]),
        ("logit_bias", {str(i): 1 for i in range(1025)}),
        ("min_tokens", -1),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [1.5]),
        ("stop_token_ids", [1] * 129),
        ("include_stop_str_in_output", "yes"),
        ("skip_special_tokens", 0),
        ("return_token_ids", "no"),
        ("no_such_field", 1),
    ],
)
def test_a_wrong_or_unsupported_field_is_refused_by_name(field, value):
    error = refusal(CompletionBody, json.dumps(COMPLETION | {field: value}).encode())
    assert error.param is not None and error.param.partition("[")[0].partition(".")[0] == field
    assert field in str(error)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "hi", "tool_call_id": "c"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages[0].audio"),
        ({"messages": [{"role": "user", "content": [{"type": "refusal", "text": "no"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"n": 200}, "n"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"stream": True, "stream_options": {"no_such": 1}}, "stream_options.no_such"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"functions": [{"name": "a b"}]}, "functions[0].name"),
        ({"function_call": "required"}, "function_call"),
        ({"function_call": {"name": 1}}, "function_call.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "a b"}}]}, "tools[0].custom.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "f", "mood": 1}}]}, "tools[0].custom.mood"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice.allowed_tools.mode"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0]"),
        (
            {"messages": [{"role": "user", "content": "x", "function_call": {"name": "f", "arguments": ""}}]},
            "messages[0]",
        ),
    ],
)
def test_nested_fields_are_named_by_their_path(fields, param):
    assert refusal(ChatBody, json.dumps(CHAT | fields).encode()).param == param


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model":"m","prompt":"\\ud800"}',
        b'{"model":"m","prompt":"hi","temperature":NaN}',
        b'{"model":"m","prompt":"hi","temperature":Infinity}',
        b'{"model":"m","prompt":"hi","temperature":1e999}',
        b'{"model":"m","prompt":"hi","top_k":' + b"9" * 5000 + b"}",
        b'{"model":"m","prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model":"m","prompt":"hi","metadata":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    ],
)
def test_what_is_no_sensible_json_is_refused(content):
    refusal(CompletionBody, content)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text() | st.integers(), st.lists, max_leaves=5))
def test_no_value_of_any_field_is_more_than_refused(value):
    for field in ("temperature", "max_tokens", "stop", "prompt", "model", "stream", "stream_options", "seed", "n"):
        try:
            parse_body(CompletionBody, json.dumps(COMPLETION | {field: value}).encode(), warn_unknown=False)
        except ApiError as error:
            assert error.status == 400


def test_null_means_absent():
    body = completion(temperature=None, stop=None, seed=None, max_tokens=None, logprobs=None, no_such_field=None)
    assert body.model_dump(exclude_none=True) == COMPLETION | {"prompt": ["hi"]}


def test_values_that_ask_for_nothing_are_fine():
    completion(n=1, best_of=1, echo=False, suffix="", logit_bias={}, presence_penalty=0, frequency_penalty=0.0)
    chat(tools=[], response_format={"type": "text"}, logprobs=False, n=1, tool_choice="auto")
    chat(user="u", metadata={"k": "v"}, store=True, service_tier="auto", safety_identifier="s", prompt_cache_key="k")


UNUSED = {
    "user": ("u", [1, True, {}, ["u"]]),
    "metadata": (
        {f"{i:064}": "v" * 512 for i in range(16)},
        ["k", [], {"k": 1}, {"k": None}, {"k": {}}, {"k": "v" * 513}, {"k" * 65: "v"}, {str(i): "" for i in range(17)}],
    ),
    "store": (False, ["no", 0, {}]),
    "service_tier": ("flex", ["gold", "", 1, ["auto"]]),
    "safety_identifier": ("s" * 128, ["s" * 129, 5]),
    "prompt_cache_key": ("p", [5, ["p"]]),
}


@pytest.mark.parametrize("field", UNUSED)
@pytest.mark.parametrize(
    ("body_class", "given"),
    [
        (CompletionBody, COMPLETION),
        (ChatBody, CHAT),
        (ResponsesBody, {"model": "m", "input": "hi"}),
        (EmbeddingsBody, {"model": "m", "input": "hi"}),
    ],
)
def test_a_field_without_effect_has_openais_type(body_class, given, field):
    if field not in body_class.model_fields:
        assert refusal(body_class, json.dumps(given | {field: UNUSED[field][0]}).encode()).param == field
        return
    fine, wrong = UNUSED[field]
    for value in (fine, None):
        parse_body(body_class, json.dumps(given | {field: value}).encode(), warn_unknown=False)
    for value in wrong:
        error = refusal(body_class, json.dumps(given | {field: value}).encode())
        assert error.param == field and len(str(error)) < 200


@pytest.mark.parametrize("body", [chat_params.CompletionCreateParamsBase, responses_params.ResponseCreateParamsBase])
def test_every_service_tier_of_openais_client_is_taken(body):
    (tiers, _) = get_args(get_type_hints(body)["service_tier"])
    assert "flex" in get_args(tiers) and {*get_args(tiers)} <= {*get_args(ServiceTier)}


def test_an_answer_can_be_sent_back_as_a_message():
    answer = {"role": "assistant", "content": "hello", "refusal": None, "annotations": [], "tool_calls": None}
    chat(messages=[*CHAT["messages"], answer, *CHAT["messages"]])


def test_what_sdks_add_to_messages_is_fine_there_and_has_no_effect():
    function = {"name": "f", "arguments": "{", "parsed_arguments": None, "mood": 1}
    call = {"id": "c", "index": 0, "type": "function", "function": function, "mood": 1}
    answer = {"role": "assistant", "content": None, "parsed": None, "audio": None, "tool_calls": [call], "mood": 1}
    parts = [{"type": "text", "text": "a", "cache_control": {}}, {"type": "refusal", "refusal": "b", "mood": 1}]
    sent = [*CHAT["messages"], answer, {"role": "user", "content": parts, "mood": 1}]
    body, ignored = parse_body(ChatBody, json.dumps(CHAT | {"messages": sent}).encode(), warn_unknown=True)
    assert (ignored, body.messages[2].content) == ([], "a\nb")
    assert body.messages[1].tool_calls[0].function.arguments == "{"


def test_text_parts_are_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].content == "a\nb"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("hi", ["hi"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]])],
)
def test_prompts_come_in_four_forms(prompt, prompts):
    assert completion(prompt=prompt).prompt == prompts


def test_with_warn_ignored_fields_are_listed_instead():
    content = json.dumps(CHAT | {"audio": {}, "mood": 1, "top_p": 0.5}).encode()
    body, ignored = parse_body(ChatBody, content, warn_unknown=True)
    assert (body.top_p, sorted(ignored)) == (0.5, ["audio", "mood"])
