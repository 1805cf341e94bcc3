"""stellarbyte_client against a real server: each test for the synchronous and the asynchronous client."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from typing import Any

import httpx
import msgspec
import openai
import pytest

import stellarbyte_client
from stellarbyte_client import AsyncStellarByte, ConnectionFailed, Health, ServerError, StellarByte
from stellarbyte_server.api.contract import adapter_objects, objects
from tests.clients.either import Blocking, Connect
from tests.clients.keys import ADMIN_KEY, USER_KEY
from tests.support.servers.fake_engine import CRASH, make_model_folder
from tests.support.servers.server_process import FAKE, ROOT, ServerProcess, running
from tests.support.stubs.http_stub import Stub

CHAT = [{"role": "user", "content": "the capital of France"}]


def raw(server: ServerProcess, path: str) -> Any:
    return httpx.get(server.url + path, headers={"Authorization": f"Bearer {ADMIN_KEY}"}).json()


# Adapters


def test_adapters_are_loaded_replaced_and_unloaded(client: Any) -> None:
    assert [adapter.id for adapter in client.adapters.list()] == ["json", "pirate"]
    loaded = client.adapters.load("mine", "pirate")
    assert (loaded.lora_name, loaded.rank, loaded.unmatched) == ("mine", 4, ())
    assert "model.layers.0.self_attn.q_proj" in loaded.matched
    (mine,) = [adapter for adapter in client.adapters.list() if adapter.id == "mine"]
    assert (mine.state, mine.root, mine.content_hash) == ("ready", "pirate", loaded.content_hash)
    with pytest.raises(ServerError, match="load_inplace") as refused:
        client.adapters.load("mine", "json")
    assert (refused.value.status, refused.value.type) == (400, "invalid_request_error")
    assert client.adapters.load("mine", "json", replace=True).content_hash != loaded.content_hash
    unloaded = client.adapters.unload("mine")
    assert unloaded.lora_name == "mine" and unloaded.freed_bytes >= loaded.bytes
    assert [adapter.id for adapter in client.adapters.list()] == ["json", "pirate"]


def test_an_adapter_has_versions_goes_back_and_is_split(client: Any) -> None:
    first = client.adapters.load("mine", "pirate")
    second = client.adapters.load("mine", "json", replace=True)
    assert (first.version, second.version) == (1, 2) and first.probe.max_logit_change > 0
    history = client.adapters.versions("mine")
    assert [each.content_hash for each in history.data] == [first.content_hash, second.content_hash]
    assert [(each.source, each.created_by) for each in history.data] == [("pirate", "admin"), ("json", "admin")]
    assert history.data[1].probe == second.probe and history.current == 2
    split = client.adapters.split("mine", {"1": 0.25, second.content_hash: 0.75})
    assert split.shares == {first.content_hash: 0.25, second.content_hash: 0.75}
    assert {each.share for each in client.adapters.list() if each.id == "mine"} == {0.25, 0.75}
    assert client.adapters.split("mine", {}).shares == {}
    back = client.adapters.rollback("mine")
    assert back.current == 1 and client.adapters.rollback("mine", 2).current == 2
    with pytest.raises(ServerError, match="add up to 1"):
        client.adapters.split("mine", {"1": 0.5})
    assert client.adapters.load("mine", "pirate", replace=True, probe=False).probe is None
    client.adapters.unload("mine")
    with pytest.raises(ServerError, match="no adapter 'mine' that was loaded over HTTP"):
        client.adapters.versions("mine")


def test_watching_shows_each_change(client: Any) -> None:
    lists = client.adapters.watch(interval_s=0.01)
    at_first = next(lists)
    assert at_first == client.adapters.list()
    client.adapters.load("watched", "pirate")
    assert {adapter.id for adapter in next(lists)} == {"json", "pirate", "watched"}
    client.adapters.unload("watched")
    assert next(lists) == at_first


def test_watching_shows_nothing_where_nothing_changes(connect: Connect, stub: Stub, client: Any) -> None:
    (one, other) = msgspec.to_builtins(client.adapters.list())
    for data in ([one], [one], [one], [other]):
        stub.answer(json.dumps({"object": "list", "data": data}))
    lists = connect(stub.url).adapters.watch(interval_s=0.001)
    assert [[adapter.id for adapter in next(lists)] for _ in range(2)] == [[one["id"]], [other["id"]]]
    assert len(stub.asked) == 4


# Models, tokens, metrics, state


def test_models_and_adapters_are_those_of_the_server(client: Any, adapter_server: ServerProcess) -> None:
    for listed, path, kind in (
        (client.models(), "/v1/models", "model"),
        (client.adapters.list(), "/v1/adapters", "adapter"),
    ):
        assert [msgspec.to_builtins(entry) | {"object": kind} for entry in listed] == raw(adapter_server, path)["data"]
    assert [model.id for model in client.models()] == ["tiny", "json", "pirate"]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (stellarbyte_client.Adapter, adapter_objects.AdapterEntry),
        (stellarbyte_client.LoadedAdapter, adapter_objects.LoadedAdapter),
        (stellarbyte_client.UnloadedAdapter, adapter_objects.UnloadedAdapter),
        (stellarbyte_client.Model, objects.ModelCard),
        (stellarbyte_client.Tokenized, objects.Tokenized),
    ],
)
def test_no_field_of_the_server_is_missing(ours: type[msgspec.Struct], theirs: type[objects.AnswerObject]) -> None:
    assert {*ours.__struct_fields__} == theirs.model_fields.keys() - {"object"}


def test_tokens_of_a_text_and_back(client: Any) -> None:
    text = "the capital of France — Paris"
    tokenized = client.tokenize(text, return_token_strs=True)
    assert tokenized.count == len(tokenized.tokens) == len(tokenized.token_strs) > 1
    assert tokenized.max_model_len == 512
    assert client.detokenize(tokenized.tokens) == text
    assert client.tokenize(text, model="pirate").token_strs is None


def test_tokens_of_a_chat_are_those_of_its_template(client: Any) -> None:
    asked = client.tokenize(messages=CHAT)
    assert client.detokenize(asked.tokens).endswith("<|im_end|>\n<|im_start|>assistant\n")
    unasked = client.tokenize(messages=CHAT, add_generation_prompt=False)
    assert client.detokenize(unasked.tokens).endswith("<|im_end|>\n")


def test_each_option_of_tokenize_is_sent(connect: Connect, stub: Stub) -> None:
    stub.answer('{"count": 1, "max_model_len": 8, "tokens": [3], "token_strs": ["a"], "new": 1}')
    options = {
        "messages": CHAT,
        "model": "tiny",
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "add_special_tokens": False,
        "add_generation_prompt": False,
        "continue_final_message": True,
        "return_token_strs": True,
    }
    assert connect(stub.url).tokenize(**options).tokens == (3,)
    assert json.loads(stub.asked[0].body) == options


def test_answers_are_rated(client: Any, adapter_server: ServerProcess) -> None:
    body = {"model": "tiny", "prompt": "France", "max_tokens": 2, "n": 2, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {USER_KEY}"}
    asked = httpx.post(f"{adapter_server.url}/v1/completions", json=body, headers=headers, timeout=60).json()
    good = client.rate(asked["id"], "good")
    bad = client.rate(asked["id"], "bad", answer="Paris", comment="no city", index=1)
    fields = ("id", "rating", "answer", "comment", "index")
    stored = [tuple(each[name] for name in fields) for each in raw(adapter_server, "/v1/feedback")["data"][:2]]
    assert stored == [(bad, "bad", "Paris", "no city", 1), (good, "good", None, None, 0)]
    with pytest.raises(ServerError, match="cannot be rated") as refused:
        client.rate(f"cmpl-{'0' * 24}", "good")
    assert (refused.value.status, refused.value.param) == (404, "id")


def test_metrics_count_what_openais_client_of_ours_generates(client: Any, adapter_server: ServerProcess) -> None:
    def generated() -> float:
        (sample,) = [sample for sample in client.metrics() if sample.name == "vllm:generation_tokens_total"]
        assert sample.labels == {"model_name": "tiny"}
        return sample.value

    before = generated()
    with StellarByte(adapter_server.url, api_key=USER_KEY) as generating:
        generating.openai().completions.create(
            model="tiny", prompt="the", max_tokens=5, extra_body={"ignore_eos": True}
        )
    assert generated() == before + 5
    with StellarByte(adapter_server.url) as unknown, pytest.raises(openai.AuthenticationError):
        unknown.openai().models.list()


def test_the_asynchronous_client_gives_openais_asynchronous_one(adapter_server: ServerProcess) -> None:
    async def models() -> list[str]:
        async with AsyncStellarByte(adapter_server.url, USER_KEY) as client:
            return [model.id async for model in client.openai().models.list()]

    assert asyncio.run(models()) == ["tiny", "json", "pirate"]


def test_openais_client_is_one_and_ends_with_ours(connect: Connect) -> None:
    client = connect(timeout_s=7)
    generating = client.openai()
    assert client.openai() is generating
    assert (generating.timeout.read, generating.timeout.connect, generating.max_retries) == (7, 5, 0)
    assert not generating.is_closed()
    client.close()
    assert generating.is_closed()


def test_openais_client_tries_nothing_twice(stub: Stub) -> None:
    stub.answer("{}", status=503)
    with StellarByte(stub.url) as client, pytest.raises(openai.InternalServerError):
        client.openai().models.list()
    assert len(stub.asked) == 1


def test_without_the_package_openai_the_error_says_what_to_install(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'stellarbyte-client\[openai\]'"):
        connect().openai()


def test_a_server_that_works_is_healthy_and_ready(client: Any, adapter_server: ServerProcess) -> None:
    assert client.health() == Health(is_healthy=True, reason=None)
    assert client.is_ready() is True
    assert client.version() == raw(adapter_server, "/version")["version"]


def test_a_server_whose_engine_died_says_so(tmp_path) -> None:
    with running(FAKE, "--model", str(make_model_folder(tmp_path / "fake"))) as server:
        with asyncio.Runner() as runner, StellarByte(server.url) as sync:
            clients = [sync, Blocking(AsyncStellarByte(server.url), runner)]
            with pytest.raises(openai.APIStatusError):
                openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0).completions.create(
                    model="fake", prompt=CRASH
                )
            deadline_s = time.monotonic() + 60
            while sync.health().is_healthy:  # the answer may come before the engine's process has ended
                assert time.monotonic() < deadline_s
            for client in clients:
                health = client.health()
                assert not health.is_healthy and "engine" in health.reason
                assert client.is_ready() is False
                with pytest.raises(ServerError) as unavailable:
                    client.adapters.list()
                assert (unavailable.value.status, unavailable.value.code) == (503, "engine_unavailable")
                assert unavailable.value.retry_after_s == 5
            server.stop()
            for client in clients:
                assert client.is_ready() is False
                with pytest.raises(ConnectionFailed):
                    client.health()
            clients[1].close()


# The example


def test_the_example_loads_asks_and_unloads_an_adapter(adapter_server: ServerProcess) -> None:
    command = [
        sys.executable,
        "clients/examples/manage_adapters.py",
        "mine",
        "pirate",
        "What is the capital of France?",
    ]
    environment = os.environ | {"STELLARBYTE_URL": adapter_server.url}

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, env=environment | variables, capture_output=True, text=True)

    result = run(STELLARBYTE_ADMIN_API_KEY=ADMIN_KEY)
    assert result.returncode == 0, result.stderr
    assert "of at most 512 tokens\nloaded mine: rank 4, 21 modules" in result.stdout
    assert re.search(r"\nmine: ready, slot, 1 requests, [1-9]\d* tokens\n", result.stdout)
    assert result.stdout.splitlines()[-1].startswith("unloaded mine: ")
    refused = run()
    assert refused.returncode == 1 and refused.stderr.startswith(
        "error: This request needs one of the server's API keys"
    )
