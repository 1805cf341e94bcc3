"""Tools of a model whose calls begin with special tokens, as Mistral's do, over HTTP.

The model is random, so only what the grammar makes of its answers is looked at.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import AddedToken, Tokenizer

from stellarbyte.checkpoint.convert import convert
from tests.support.models.hugging_face import tiny_llama
from tests.support.over_http import assert_error
from tests.support.servers.server_process import REAL, ServerProcess, running
from tests.support.tools.offered import custom, function
from tests.support.tools.templates import MISTRAL_NEW

WEATHER = function("get", city={"enum": ["Rome", "Oslo"]})
MODES = custom("run", "lark", 'start: "a" ("b" | "\\"}")')
ASK = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("mistral")
    convert(tiny_llama(folder / "hf", chat_template=MISTRAL_NEW, max_position_embeddings=4096), folder / "tiny")
    _rename_special_tokens(folder / "tiny" / "tokenizer.json")
    with running(REAL, "--model", str(folder / "tiny")) as server:
        yield server


def _rename_special_tokens(file: Path) -> None:
    """Two tokens that the model knows become the marks of calls."""
    tokenizer = json.loads(file.read_text())
    longest = sorted(tokenizer["model"]["vocab"], key=lambda token: tokenizer["model"]["vocab"][token])[-2:]
    for token, mark in zip(longest, ("[TOOL_CALLS]", "[ARGS]"), strict=True):
        tokenizer["model"]["vocab"][mark] = tokenizer["model"]["vocab"].pop(token)
    tokenizer["model"]["merges"] = [merge for merge in tokenizer["model"]["merges"] if "".join(merge) not in longest]
    changed = Tokenizer.from_str(json.dumps(tokenizer))
    changed.add_special_tokens([AddedToken(mark, special=True) for mark in ("[TOOL_CALLS]", "[ARGS]")])
    changed.save(str(file))


def chat(server: ServerProcess, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": [ASK], "tools": [WEATHER, MODES], "temperature": 1, "seed": 3}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body | {"max_tokens": 40} | fields, timeout=60)


def named(kind: str, name: str) -> dict[str, Any]:
    return {"type": kind, kind: {"name": name}}


def test_a_forced_call_is_written_with_the_special_tokens_and_read_without_them(server: ServerProcess) -> None:
    answer = chat(server, tool_choice=named("function", "get"), return_token_ids=True).json()
    (choice,) = answer["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")
    told = httpx.post(f"{server.url}/detokenize", json={"tokens": choice["token_ids"]}).json()["prompt"]
    assert told == f"[TOOL_CALLS]get[ARGS]{call['function']['arguments']}"


def test_a_streamed_call_is_the_same_and_begins_without_content(server: ServerProcess) -> None:
    whole = chat(server, tool_choice="required").json()["choices"][0]["message"]
    events = chat(server, tool_choice="required", stream=True).text.split("\n\n")
    deltas = [json.loads(event[6:])["choices"][0]["delta"] for event in events if event.startswith("data: {")]
    assert deltas[0] == {"role": "assistant", "content": None}
    assert not any(delta.get("content") for delta in deltas)
    texts: dict[int, str] = {}
    for call in [call for delta in deltas for call in delta.get("tool_calls", [])]:
        part = call.get("function", {}).get("arguments", "") + call.get("custom", {}).get("input", "")
        texts[call["index"]] = texts.get(call["index"], "") + part
    said = [call.get("function", {}).get("arguments") or call["custom"]["input"] for call in whole["tool_calls"]]
    assert [*texts.values()] == said


def test_a_custom_tool_is_called_with_a_text_of_its_grammar(server: ServerProcess) -> None:
    answer = chat(server, tool_choice=named("custom", "run")).json()["choices"][0]
    (call,) = answer["message"]["tool_calls"]
    assert (call["type"], call["custom"]["name"], answer["finish_reason"]) == ("custom", "run", "tool_calls")
    assert call["custom"]["input"] in ("ab", 'a"}')


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_a_forced_call_that_is_cut_off_is_no_content(server: ServerProcess, max_tokens: int) -> None:
    (choice,) = chat(server, tool_choice=named("function", "get"), max_tokens=max_tokens).json()["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "")
    assert "tool_calls" not in choice["message"]


def test_allowed_tools_are_the_only_ones_called(server: ServerProcess) -> None:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named("function", "get")]}}
    for seed in range(4):
        answer = chat(server, tool_choice=choice, parallel_tool_calls=False, seed=seed).json()["choices"][0]
        assert [call["function"]["name"] for call in answer["message"]["tool_calls"]] == ["get"]


def test_functions_are_answered_in_their_older_form(server: ServerProcess) -> None:
    older = {"tools": None, "functions": [WEATHER["function"]], "function_call": {"name": "get"}}
    choice = chat(server, **older).json()["choices"][0]
    called = choice["message"]["function_call"]
    assert (choice["finish_reason"], called["name"]) == ("function_call", "get")
    result = {"role": "function", "name": "get", "content": "sunny"}
    told = [ASK, choice["message"], result]
    assert chat(server, **older, messages=told).status_code == 200
    assert_error(chat(server, **older, messages=[ASK, result]), 400, "messages[1]")
    assert_error(chat(server, **older, tool_choice="auto"), 400, "function_call")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "tool", "tool_call_id": "a", "content": "x"}], "messages[1]"),
        ([{"role": "assistant", "tool_calls": [named("function", "get") | {"id": "a"}]}], None),
    ],
)
def test_calls_and_results_that_do_not_fit_are_refused(server: ServerProcess, messages: Any, param: str | None) -> None:
    for message in messages:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = "{}"
    assert_error(chat(server, messages=[ASK, *messages]), 400, param or "messages[1]")


@pytest.mark.parametrize(
    "definition", ["start: x", "not a grammar", "start: %json {}", "start: a\na: a a a", 'start: "x" } start: "y"']
)
def test_a_grammar_that_cannot_be_used_is_refused(server: ServerProcess, definition: str) -> None:
    error = chat(server, tools=[custom("run", "lark", definition)], tool_choice="required").json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"].startswith("tools")
