"""Activated adapters (aLoRA) over HTTP: what they share with the model, what their answers say, what is refused."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from stellarbyte import ByteTransformer
from stellarbyte.cli.main import main
from stellarbyte.lora import load_adapter
from tests.support.batches import line, results, start, wait
from tests.support.models.adapters import write_adapter
from tests.support.models.byte_transformer import random_tokens
from tests.support.servers.adapter_server import KnownModel
from tests.support.servers.server_process import REAL, ServerProcess, running

INVOCATION = (9, 7)
NUM_TOKENS = 8
BLOCK, SINKS = 16, 4  # tokens
KEYS = """
[all]
key = "key-all"
[one]
key = "key-one"
models = ["act"]
"""
MALFORMED: dict[str, tuple[Any, str]] = {
    "empty": ([], "must be a list of 1 to 256 token ids"),
    "text": ("check", "must be a list of 1 to 256 token ids"),
    "fractions": ([1.5], "must be a list of 1 to 256 token ids"),
    "negative": ([-1], "must be a list of 1 to 256 token ids"),
    "unknown": ([9, 300], "has 300, but the model has 300 tokens"),
}


@dataclass
class Invoking:
    server: ServerProcess
    folder: Path  # --adapter-dir
    model: ByteTransformer
    model_folder: str = ""

    def post(self, path: str, body: dict[str, Any], key: str = "all") -> httpx.Response:
        headers = {"Authorization": f"Bearer key-{key}"}
        return httpx.post(self.server.url + path, json=body, headers=headers, timeout=60)

    def complete(self, model: str, prompt: list[int], key: str = "all", **fields: Any) -> httpx.Response:
        wanted = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return self.post("/v1/completions", {"model": model, "prompt": prompt} | wanted | fields, key)

    def answer(self, model: str, prompt: list[int], **fields: Any) -> tuple[list[int], dict[str, int]]:
        """The answer's tokens, and the details of its prompt's tokens."""
        response = self.complete(model, prompt, **fields)
        assert response.status_code == 200, response.text
        answer = response.json()
        return answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens_details"]


@pytest.fixture(scope="module")
def invoking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Invoking]:
    folder = tmp_path_factory.mktemp("invoking")
    known = KnownModel.make(folder)
    offered = folder / "adapters"
    write_adapter(offered / "act", known.model, 1, size=0.5, invocation=INVOCATION)
    write_adapter(offered / "plain", known.model, 1, size=0.5)
    for name, (tokens, _) in MALFORMED.items():
        shutil.copytree(offered / "act", offered / name)
        file = offered / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"alora_invocation_tokens": tokens}))
    keys = folder / "keys.toml"
    keys.write_text(KEYS)
    keys.chmod(0o600)
    flags = ["--adapter-dir", str(offered), "--keys", str(keys), "--admin-api-key", "key-admin"]
    flags += ["--data-dir", str(folder / "data")]
    with running(REAL, "--model", str(known.folder), "--block-size", str(BLOCK), *flags) as server:
        yield Invoking(server, offered, known.model, str(known.folder))


def prompt_of(seed: int, *, invoked: bool = True) -> list[int]:
    """Sinks, 5 blocks and a part of one of other tokens, then the invocation and a few more."""
    before = [10 + token for token in random_tokens(SINKS + 5 * BLOCK + 5, seed=seed)]
    return [*before, *(INVOCATION if invoked else (8, 8)), 40, 41]


def expected(invoking: Invoking, adapter: str | None, prompt: list[int]) -> list[int]:
    """By the library, in one pass and a cache of its own."""
    model = ByteTransformer(invoking.model.config).eval()
    model.load_state_dict(invoking.model.state_dict())
    if adapter is not None:
        load_adapter(model, invoking.folder / adapter)
    options: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": None}
    return model.generate(torch.tensor([prompt]), pad_token_id=0, **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("first", ["base", "adapter"])
def test_a_prompt_is_read_once_for_the_model_and_the_adapter(invoking: Invoking, first: str) -> None:
    prompt = prompt_of(seed=1 if first == "base" else 2)
    names = ("tiny", "act") if first == "base" else ("act", "tiny")
    shared = SINKS + 5 * BLOCK  # all blocks before the invocation
    for name, cached in zip(names, (0, shared), strict=True):
        tokens, details = invoking.answer(name, prompt)
        adapted = {"adapted_tokens": len(INVOCATION) + 2} if name == "act" else {}
        assert details == {"cached_tokens": cached} | adapted
        assert tokens == expected(invoking, None if name == "tiny" else name, prompt)
        assert invoking.answer(name, prompt, cache_salt=f"cold {first} {name}")[0] == tokens
    assert invoking.answer("plain", prompt)[1] == {"cached_tokens": 0}


def test_without_the_invocation_the_answer_is_the_models_and_says_so(invoking: Invoking) -> None:
    prompt = prompt_of(seed=3, invoked=False)
    tokens, details = invoking.answer("act", prompt)
    assert details == {"cached_tokens": 0, "adapted_tokens": 0}
    assert tokens == expected(invoking, None, prompt) == invoking.answer("tiny", prompt)[0]
    assert invoking.answer("plain", prompt)[0] == expected(invoking, "plain", prompt) != tokens


def test_a_key_that_may_not_use_the_model_must_invoke_the_adapter(invoking: Invoking) -> None:
    assert invoking.complete("act", prompt_of(seed=4), key="one").status_code == 200
    refused = invoking.complete("act", prompt_of(seed=4, invoked=False), key="one")
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (403, "model_not_allowed", "model")
    assert "does not contain the invocation of the adapter 'act'" in error["message"]
    shown = {"prompt_logprobs": 3}
    refused = invoking.complete("act", prompt_of(seed=4), key="one", **shown)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (403, "model_not_allowed")
    assert "has tokens before the invocation of the adapter 'act'" in error["message"]
    assert invoking.complete("act", [*INVOCATION, 40, 41], key="one", **shown).status_code == 200
    assert invoking.complete("act", prompt_of(seed=4), **shown).status_code == 200
    pooled = invoking.post("/v1/embeddings", {"model": "act", "input": [40, 41, 42]}, key="one")
    assert (pooled.status_code, pooled.json()["error"]["code"]) == (403, "model_not_allowed")


def test_streams_and_chats_count_the_tokens_of_the_adapter(invoking: Invoking) -> None:
    body = {"model": "act", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    usage = invoking.post("/v1/chat/completions", body).json()["usage"]
    assert usage["prompt_tokens_details"]["adapted_tokens"] == 0
    response = invoking.complete("act", prompt_of(seed=5), stream=True, stream_options={"include_usage": True})
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    (used,) = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert used["prompt_tokens_details"]["adapted_tokens"] == len(INVOCATION) + 2


def test_loading_probes_the_adapter_behind_its_invocation(invoking: Invoking) -> None:
    loaded = invoking.post("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": "act"}, key="admin")
    assert loaded.status_code == 200, loaded.text
    assert loaded.json()["probe"]["max_logit_change"] > 0
    headers = {"Authorization": "Bearer key-admin"}
    cards = httpx.get(f"{invoking.server.url}/v1/adapters", headers=headers).json()["data"]
    (card,) = [card for card in cards if card["id"] == "mine"]
    assert card["invocation_tokens"] == list(INVOCATION)
    plain = invoking.post("/v1/load_lora_adapter", {"lora_name": "same", "lora_path": "plain"}, key="admin")
    assert plain.json()["content_hash"] != loaded.json()["content_hash"]


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_invocations_are_refused_by_name(invoking: Invoking, name: str) -> None:
    response = invoking.complete(name, prompt_of(seed=6))
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert "alora_invocation_tokens" in message and MALFORMED[name][1] in message


@pytest.mark.parametrize("mix", ["act+plain", "plain+act"])
def test_a_mix_with_an_activated_adapter_is_refused_by_name(invoking: Invoking, mix: str) -> None:
    response = invoking.complete(mix, prompt_of(seed=7))
    assert response.status_code == 400, response.text
    assert "'act' is an activated adapter (alora_invocation_tokens), which cannot be mixed" in response.text
    assert invoking.complete("plain", prompt_of(seed=7)).status_code == 200


def test_a_batch_has_the_answers_of_single_requests(invoking: Invoking) -> None:
    asked = {
        f"{model} {seed}": (model, prompt_of(seed=seed, invoked=invoked))
        for model in ("act", "tiny", "plain")
        for seed, invoked in ((20, True), (21, False))
    }
    fields = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    content = b"".join(
        line(name, {"model": model, "prompt": prompt} | fields) for name, (model, prompt) in asked.items()
    )
    client = openai.OpenAI(base_url=f"{invoking.server.url}/v1", api_key="key-all", max_retries=0)
    batch = wait(client, start(client, content).id)
    answered = results(client, batch.output_file_id)
    assert answered.keys() == asked.keys(), batch
    for name, (model, prompt) in asked.items():
        body = answered[name]["response"]["body"]
        assert body["choices"][0]["token_ids"] == expected(invoking, None if model == "tiny" else model, prompt), name
        if model == "act":
            adapted = len(INVOCATION) + 2 if name == "act 20" else 0
            assert body["usage"]["prompt_tokens_details"]["adapted_tokens"] == adapted


def test_rendered_prompts_are_those_of_the_answers(invoking: Invoking) -> None:
    prompt = prompt_of(seed=22)
    fields: dict[str, Any] = {"model": "act", "max_tokens": 2}
    (rendered,) = invoking.post("/v1/completions/render", fields | {"prompt": prompt}).json()
    assert (rendered["token_ids"], rendered["model"]) == (prompt, "act")
    fields |= {"messages": [{"role": "user", "content": "hello"}]}
    answered = invoking.post("/v1/chat/completions", fields | {"return_token_ids": True}).json()
    rendered = invoking.post("/v1/chat/completions/render", fields).json()
    assert (rendered["token_ids"], rendered["model"]) == (answered["prompt_token_ids"], "act")


@pytest.mark.parametrize("invoked", [True, False])
def test_a_receipt_is_replayed(
    invoking: Invoking, invoked: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = prompt_of(seed=23, invoked=invoked)
    receipt = invoking.complete("act", prompt, receipt=True, temperature=1.0).json()["receipt"]
    assert len(receipt["adapter"]) == 64
    file = tmp_path / "receipt.json"
    for answers, status in ((receipt["answers"], 0), ([[*receipt["answers"][0][:-1], 299]], 1)):
        file.write_text(json.dumps(receipt | {"answers": answers}))
        arguments = ["replay", str(file), "--url", invoking.server.url, "--api-key", "key-all"]
        assert main(arguments) == status, capsys.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize("scale", [["--replicas", "2"], ["--tensor-parallel-size", "2"]], ids=" ".join)
def test_several_engines_and_ranks_give_the_same_answers(invoking: Invoking, scale: list[str]) -> None:
    """Requests of three kinds at once, then one by one from the cache of the engine that has their prompt: a busy
    engine would leave them to the other."""
    flags = ["--model", invoking.model_folder, "--block-size", str(BLOCK), "--adapter-dir", str(invoking.folder)]
    prompts = {seed: prompt_of(seed=seed) for seed in range(30, 34)}
    asked = [(model, seed) for seed in prompts for model in ("act", "tiny", "plain")]
    with running(REAL, *flags, *scale) as server, ThreadPoolExecutor(len(asked)) as threads:
        scaled = Invoking(server, invoking.folder, invoking.model)
        for is_again in (False, True):
            mapped = map if is_again else threads.map
            answers = mapped(lambda each: scaled.answer(each[0], prompts[each[1]]), asked)
            for (model, seed), (tokens, details) in zip(asked, answers, strict=True):
                assert tokens == expected(invoking, None if model == "tiny" else model, prompts[seed]), (model, seed)
                assert details.get("adapted_tokens") == (len(INVOCATION) + 2 if model == "act" else None)
                assert not is_again or details["cached_tokens"] >= SINKS + 5 * BLOCK
