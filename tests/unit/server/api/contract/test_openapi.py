"""The document at /openapi.json has every route, is valid, and says of bodies and answers what is so; the page too."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from stellarbyte_server.api.contract import message_objects, objects
from stellarbyte_server.api.contract.bodies.adapters import LoadBody, UnloadBody
from stellarbyte_server.api.contract.bodies.anthropic.messages import CountTokensBody, MessagesBody
from stellarbyte_server.api.contract.bodies.body import Body, parse_body, parse_plain_body
from stellarbyte_server.api.contract.bodies.chat import ChatBody
from stellarbyte_server.api.contract.bodies.completion import CompletionBody
from stellarbyte_server.api.contract.bodies.tokenize import DetokenizeBody, TokenizeChatBody, TokenizePromptBody
from stellarbyte_server.api.contract.errors import ApiError, error_content
from stellarbyte_server.api.contract.openapi import make_document
from stellarbyte_server.api.endpoints import OPERATIONS
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.protocol.messages import EngineInfo
from stellarbyte_server.tokens.tokenizer import load_prompt_tokenizer
from tests.support.application import make_app
from tests.support.documented_objects import conforms
from tests.support.servers.fake_engine import make_model_folder

MODEL = "a-model"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    """The application, without an engine."""
    folder = make_model_folder(tmp_path_factory.mktemp("model"))
    info = EngineInfo(
        model_path=str(folder),
        max_model_len=2048,
        vocab_size=259,
        hidden_size=16,
        num_blocks=1,
        block_size=16,
        max_num_seqs=64,
        device="cpu",
        dtype="float32",
        quantization="none",
        kv_cache_dtype="float32",
        weights_hash="0" * 64,
    )
    return make_app(
        info=info,
        tokenizer=load_prompt_tokenizer(folder, None, 259),
        engine=EngineSettings(model=str(folder)),
        served_model_name=MODEL,
    )


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture(scope="module")
def document(client: TestClient) -> dict[str, Any]:
    return client.get("/openapi.json").json()


def test_every_route_is_in_the_document_and_the_other_way_round(app, document):
    routes = {
        (method.lower(), route.path_format)
        for route in iter_route_contexts(app.routes)
        if route.path_format is not None and getattr(route, "include_in_schema", False)
        for method in route.methods or ()
    }
    assert routes == {(method, path) for path, item in document["paths"].items() for method in item}


def test_the_document_is_valid_openapi(document):
    assert document["openapi"].startswith("3.1")
    schemathesis.openapi.from_dict(document).validate()
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_every_reference_leads_somewhere(document):
    for path in re.findall(r'"\$ref": "#/([^"]+)"', json_text(document)):
        place = document
        for step in path.split("/"):
            place = place[step]


def test_no_name_tells_where_a_class_lies(document):
    assert not [name for name in document["components"]["schemas"] if "__" in name or name.startswith("_")]


def test_every_field_of_a_request_has_a_sentence(document):
    schemas = document["components"]["schemas"]
    posts = [item["post"] for item in document["paths"].values() if "post" in item]
    contents = [post["requestBody"]["content"] for post in posts if "requestBody" in post]
    parts = set(names := re.findall(r"schemas/(\w+)", json_text(contents)))
    while names:
        found = re.findall(r"schemas/(\w+)", json_text(schemas[names.pop()]))
        names += [name for name in found if name not in parts]
        parts.update(found)
    fields = {(part, name): field for part in schemas for name, field in schemas[part].get("properties", {}).items()}
    assert [key for key, field in fields.items() if key[0] in parts and "description" not in field] == []


def test_the_served_model_is_the_example_for_model(document):
    for name in ("CompletionBody", "ChatBody", "TokenizeChatBody"):
        assert document["components"]["schemas"][name]["properties"]["model"]["examples"] == [MODEL]


def test_every_operation_can_fail_in_the_one_form_and_says_when_to_come_back(document):
    for item in document["paths"].values():
        for operation in item.values():
            assert {"200", "500", "503"} <= operation["responses"].keys()
            assert ("requestBody" in operation) == ("413" in operation["responses"])
    for name, response in document["components"]["responses"].items():
        form = "MessagesError" if name.startswith("MessagesError") else "ErrorBody"
        assert response["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{form}"}
        assert ("Retry-After" in response["headers"]) == name.endswith(("429", "503"))


def test_the_routes_of_anthropics_api_fail_in_its_form(document):
    for path, item in document["paths"].items():
        for operation in item.values():
            failed = {each["$ref"].rpartition("/")[2] for code, each in operation["responses"].items() if code != "200"}
            assert {name.startswith("MessagesError") for name in failed} == {path.startswith("/v1/messages")}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413, 429, 500, 503])
def test_errors_are_as_described(document, status):
    assert conforms(document, "ErrorBody", error_content(status, "This went wrong."))


MESSAGE = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}
BODIES: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (CompletionBody, {"model": "m", "prompt": "a"}),
    (CompletionBody, {"model": "m", "prompt": [1, 2]}),
    (CompletionBody, {"model": "m", "prompt": ["a"]}),
    (CompletionBody, {"model": "m", "prompt": []}),
    (CompletionBody, {"model": "m", "prompt": [1, "a"]}),
    (CompletionBody, {"model": "m", "prompt": None}),
    (CompletionBody, {"prompt": "a"}),
    (CompletionBody, {"model": "m", "prompt": "a", "max_tokens": None, "mood": None, "user": [1]}),
    (CompletionBody, {"model": "m", "prompt": "a", "mood": "good"}),
    (CompletionBody, {"model": "m", "prompt": "a", "stop": "x"}),
    (CompletionBody, {"model": "m", "prompt": "a", "stop": ["x"] * 4}),
    (CompletionBody, {"model": "m", "prompt": "a", "stop": ["x"] * 5}),
    (CompletionBody, {"model": "m", "prompt": "a", "stop": ""}),
    (CompletionBody, {"model": "m", "prompt": "a", "temperature": 2.1}),
    (CompletionBody, {"model": "m", "prompt": "a", "stream": True, "stream_options": {"include_usage": True}}),
    (ChatBody, {"model": "m", "messages": [{"role": "user", "content": "hi"}]}),
    (ChatBody, {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}),
    (ChatBody, {"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    (ChatBody, {"model": "m", "messages": [{"role": "user", "content": 3}]}),
    (ChatBody, {"model": "m", "messages": [{"role": "user", "content": "hi", "mood": "good"}]}),
    (ChatBody, {"model": "m", "messages": []}),
    (MessagesBody, MESSAGE),
    (MessagesBody, MESSAGE | {"mood": "good", "system": None, "temperature": 0, "tools": []}),
    (MessagesBody, {"model": "m", "messages": MESSAGE["messages"]}),
    (MessagesBody, MESSAGE | {"messages": []}),
    (MessagesBody, MESSAGE | {"system": [{"type": "text", "text": "s", "mood": "good"}]}),
    (MessagesBody, MESSAGE | {"system": [{"type": "image", "text": "s"}]}),
    (MessagesBody, MESSAGE | {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}),
    (MessagesBody, MESSAGE | {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    (MessagesBody, MESSAGE | {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}),
    (MessagesBody, MESSAGE | {"messages": [{"role": "robot", "content": "a"}]}),
    (MessagesBody, MESSAGE | {"tools": [{"name": "f", "input_schema": {}, "type": "custom"}]}),
    (MessagesBody, MESSAGE | {"tools": [{"name": "f", "type": "web_search_20250305"}]}),
    (MessagesBody, MESSAGE | {"metadata": {"user_id": 5}}),
    (CountTokensBody, {"model": "m", "messages": MESSAGE["messages"]}),
    (TokenizePromptBody, {"prompt": "a"}),
    (TokenizePromptBody, {"prompt": None}),
    (TokenizeChatBody, {"messages": [{"role": "user", "content": "hi"}], "prompt": None}),
    (TokenizeChatBody, {"messages": [{"role": "user", "content": "hi"}], "prompt": "a"}),
    (TokenizeChatBody, {"messages": []}),
    (DetokenizeBody, {"tokens": []}),
    (DetokenizeBody, {"tokens": [-1]}),
    (DetokenizeBody, {"tokens": "1"}),
    (LoadBody, {"lora_name": "a", "lora_path": "b"}),
    (LoadBody, {"lora_name": "a", "lora_path": "b", "mood": None}),
    (UnloadBody, {"lora_name": ""}),
]


@pytest.mark.parametrize(("body_class", "value"), BODIES)
def test_a_body_is_accepted_if_and_only_if_the_document_says_so(document, body_class, value):
    content = json_text(value).encode()
    try:
        if issubclass(body_class, Body):
            parse_body(body_class, content, warn_unknown=False)
        else:
            parse_plain_body(body_class, content)
        is_accepted = True
    except ApiError:
        is_accepted = False
    assert conforms(document, body_class.__name__, value) == is_accepted


def test_a_server_that_ignores_unknown_fields_says_so():
    body = {"model": "m", "prompt": "a", "mood": "good"}
    assert conforms(make_document(OPERATIONS, "m", allows_unknown_fields=True), "CompletionBody", body)
    assert not conforms(make_document(OPERATIONS, "m", allows_unknown_fields=False), "CompletionBody", body)


USAGE = {
    "prompt_tokens": 2,
    "completion_tokens": 5,
    "total_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 0},
}
BASE = {"id": "cmpl-1", "created": 1764000000, "model": MODEL, "system_fingerprint": "fp_0123456789ab_float32"}
TOKEN = {"token": "é", "logprob": -0.5, "bytes": [195, 169]}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
CARD = {
    "id": MODEL,
    "object": "model",
    "created": 1764000000,
    "owned_by": "stellarbyte",
    "root": "/models/a",
    "parent": None,
    "max_model_len": 2048,
    "content_hash": "0" * 64,
}

THINKING = {"type": "thinking", "thinking": "hm", "signature": "x"}
THOUGHT = {"output_tokens_details": {"thinking_tokens": 1}}
VECTOR = {"object": "embedding", "index": 0, "embedding": [0.5]}


ANSWER: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": MODEL,
    "content": [{"type": "text", "text": "hi"}, {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}}],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": {
        "input_tokens": 2,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 3,
        "output_tokens": 4,
    },
}


def completion(**choice: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": "ababa", "logprobs": None, "finish_reason": "length", "stop_reason": None} | choice
    return BASE | {"object": "text_completion", "choices": [choice], "usage": USAGE}


def chat(message: dict[str, Any], **choice: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "hi", "refusal": None, "annotations": []} | message
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None} | choice
    return BASE | {"object": "chat.completion", "choices": [choice], "usage": USAGE}


def chunk(delta: dict[str, Any], **choice: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, "stop_reason": None} | choice
    return BASE | {"object": "chat.completion.chunk", "choices": [choice]}


ANSWERS: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (objects.Completion, completion()),
    (objects.Completion, completion(token_ids=[1, 2], prompt_token_ids=[3])),
    (
        objects.Completion,
        completion(
            logprobs={
                "tokens": ["a", "b"],
                "token_logprobs": [None, -1.5],
                "top_logprobs": [None, {"b": -1.5}],
                "text_offset": [0, 1],
            }
        ),
    ),
    (objects.Completion, completion() | {"usage": USAGE | {"evicted_tokens": 9}}),
    (objects.CompletionChunk, completion(text="a", finish_reason=None) | {"usage": None}),
    (objects.CompletionChunk, BASE | {"object": "text_completion", "choices": [], "usage": USAGE}),
    (objects.ChatCompletion, chat({})),
    (objects.ChatCompletion, chat({"content": None, "tool_calls": [CALL]}, finish_reason="tool_calls")),
    (
        objects.ChatCompletion,
        chat(
            {},
            logprobs={"content": [TOKEN | {"top_logprobs": [TOKEN]}], "refusal": None},
            token_ids=[1],
        )
        | {"prompt_token_ids": [2]},
    ),
    (objects.ChatCompletionChunk, chunk({"role": "assistant", "content": ""})),
    (objects.ChatCompletionChunk, chunk({"content": "hé"})),
    (objects.ChatCompletionChunk, chunk({"tool_calls": [CALL | {"index": 0}]})),
    (
        objects.ChatCompletionChunk,
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}, finish_reason="tool_calls"),
    ),
    (objects.ChatCompletionChunk, chunk({}, finish_reason="stop") | {"usage": None}),
    (
        objects.EmbeddingList,
        {"object": "list", "data": [VECTOR], "model": MODEL, "usage": {"prompt_tokens": 1, "total_tokens": 1}},
    ),
    (message_objects.AssistantMessage, ANSWER),
    (message_objects.AssistantMessage, ANSWER | {"content": [THINKING], "usage": ANSWER["usage"] | THOUGHT}),
    (message_objects.AssistantMessage, ANSWER | {"stop_reason": "stop_sequence", "stop_sequence": "END"}),
    (message_objects.MessageTokenCount, {"input_tokens": 3}),
    (message_objects.MessagesError, ApiError(429, "Too much.").anthropic_content("id")),
    (objects.ModelCard, CARD),
    (objects.ModelList, {"object": "list", "data": [CARD, CARD | {"parent": MODEL, "content_hash": None}]}),
    (objects.Tokenized, {"count": 1, "max_model_len": 9, "tokens": [0], "token_strs": ["Ġ"]}),
    (objects.Tokenized, {"count": 0, "max_model_len": 9, "tokens": [], "token_strs": None}),
]


@pytest.mark.parametrize(("model", "answer"), ANSWERS)
def test_answers_of_every_kind_are_as_described(document, model, answer):
    assert conforms(document, model.__name__, answer)
    model.model_validate_json(json_text(answer))


@pytest.mark.parametrize(("model", "answer"), ANSWERS)
def test_nothing_may_be_missing_or_added(document, model, answer):
    for name in model.model_fields:
        left_out = {key: value for key, value in answer.items() if key != name}
        assert conforms(document, model.__name__, left_out) != model.model_fields[name].is_required()
    assert not conforms(document, model.__name__, answer | {"more": None})


def test_what_is_left_out_of_answers_is_never_null(document):
    assert not conforms(document, "Completion", completion(token_ids=None))
    assert not conforms(document, "ChatCompletion", chat({"tool_calls": None}))


def test_the_page_asks_no_other_host(client):
    page = client.get("/docs")
    assert page.status_code == 200
    assert not re.search(r"https?:|[\"'(]//", page.text)
    assert '"validatorUrl": null' in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    addresses = re.findall(r"""(?:href|src)="([^"]+)"|url: '([^']+)'""", page.text)
    paths = [path for pair in addresses for path in pair if path]
    assert len(paths) == 4
    for path in paths:
        assert path.startswith("/")
        assert client.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/redoc", "/docs/oauth2-redirect", "/docs/static/no.js", "/docs/static/../page.py"])
def test_there_are_no_other_pages(client, path):
    response = client.get(path)
    assert response.status_code == 404
    objects.ErrorBody.model_validate_json(response.content)


def test_a_wrong_method_is_an_error_of_the_same_form(client):
    response = client.put("/v1/completions")
    assert response.status_code == 405
    objects.ErrorBody.model_validate_json(response.content)


def json_text(value: object) -> str:
    return json.dumps(value)
