"""Mixes of adapters, also with DoRA or a head of their own, over HTTP: answers, keys, versions, limits."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.servers.adapter_server import KnownModel, completion
from tests.support.servers.server_process import REAL, ServerProcess, running

KEYS = """
[both]
key = "key-both"
models = ["a", "b", "c", "tiny"]

[one]
key = "key-one"
models = ["a"]

[pair]
key = "key-pair"
models = ["a", "b"]
"""
MIXES: dict[str, dict[str, float]] = {"a+b": {"a": 1.0, "b": 1.0}, "scaled": {"a": 0.5, "b": 2.0, "c": 0.25}}
FORMS: dict[str, dict[str, Any]] = {
    "a": {},
    "b": {"modules_to_save": ("lm_head", "embed_tokens")},
    "c": {"use_dora": True},
}


@dataclass
class Mixing:
    server: ServerProcess
    folder: Path  # --adapter-dir
    answers: dict[str, str]

    def post(self, model: str, key: str = "both", **fields: object) -> httpx.Response:
        return self.call("/v1/completions", key, completion(model, **fields))

    def call(self, path: str, key: str, body: dict[str, object]) -> httpx.Response:
        headers = {"Authorization": f"Bearer key-{key}"}
        return httpx.post(self.server.url + path, json=body, headers=headers, timeout=60)

    def answer(self, model: str, **fields: object) -> str:
        response = self.post(model, **fields)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])


@pytest.fixture(scope="module")
def mixing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mixing]:
    folder = tmp_path_factory.mktemp("mixing")
    known = KnownModel.make(folder)
    offered = folder / "adapters"
    answers: dict[str, str] = {}
    for seed in range(50):  # the first seeds without near ties in any answer
        names = {name: 3 * seed + i for i, name in enumerate("abc")}
        answers = {name: known.add_adapter(offered / name, number, **FORMS[name])[-1] for name, number in names.items()}
        mixed = {
            mix: known.mix_answers({offered / name: s for name, s in scales.items()}) for mix, scales in MIXES.items()
        }
        answers |= {mix: texts[-1] for mix, texts in mixed.items() if texts is not None}
        if answers.keys() == {*names, *MIXES}:
            break
    keys = folder / "keys.toml"
    keys.write_text(KEYS)
    keys.chmod(0o600)
    flags = ["--adapter-dir", str(offered), "--max-loras", "2", "--max-lora-rank", "12", "--keys", str(keys)]
    flags += ["--admin-api-key", "key-boss"]
    with running(REAL, "--model", str(known.folder), *flags) as server:
        yield Mixing(server, offered, answers)


def scaled(mix: str) -> list[dict[str, object]]:
    return [{"name": name, "scale": scale} for name, scale in MIXES[mix].items()]


def test_mixes_beside_their_parts_answer_as_the_merged_weights_do(mixing: Mixing) -> None:
    """More adapters and mixes than slots, all at once."""
    assert len(set(mixing.answers.values())) == len(mixing.answers)

    def ask(name: str) -> str:
        return mixing.answer("tiny", adapters=scaled(name)) if name in MIXES else mixing.answer(name)

    names = [*mixing.answers] * 4
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, names)) == [mixing.answers[name] for name in names]
    assert mixing.answer("a+b") == mixing.answer("b+a") == mixing.answers["a+b"]


def test_a_mix_is_named_in_answers_and_in_no_list(mixing: Mixing) -> None:
    response = mixing.post("b+a")
    assert response.json()["model"] == "b+a"
    fingerprint = response.json()["system_fingerprint"]
    assert fingerprint != mixing.post("a").json()["system_fingerprint"]
    assert fingerprint == mixing.post("a+b").json()["system_fingerprint"]
    headers = {"Authorization": "Bearer key-both"}
    with httpx.Client(base_url=mixing.server.url, headers=headers) as http:
        assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["tiny", "a", "b", "c"]
        assert http.get("/v1/models/a+b").status_code == 404
        assert [card["id"] for card in http.get("/v1/adapters").json()["data"]] == ["a", "b", "c"]
        tokenized = http.post("/tokenize", json={"model": "a+b", "prompt": "hi"})
        assert tokenized.status_code == 200
        absent = mixing.call("/tokenize", "boss", {"model": "a+x", "prompt": "hi"})
        assert absent.status_code == 404
    deadline_s = time.monotonic() + 30
    while " adapter=a+b@" not in mixing.server.log():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_the_scale_of_a_request_multiplies_the_whole_mix(mixing: Mixing) -> None:
    half = [{"name": name, "scale": scale / 2} for name, scale in MIXES["scaled"].items()]
    assert mixing.answer("tiny", adapters=half, adapter_scale=2) == mixing.answers["scaled"]
    assert mixing.answer("a+b", adapter_scale=0) == mixing.answer("tiny")
    assert mixing.answer("tiny", adapters=[{"name": "a"}, {"name": "b", "scale": 0}]) == mixing.answers["a"]


def test_embeddings_are_those_of_the_mix(mixing: Mixing) -> None:
    def vector(**fields: object) -> list[float]:
        response = mixing.call("/v1/embeddings", "both", {"model": "tiny", "input": "hello", **fields})
        assert response.status_code == 200, response.text
        return list(response.json()["data"][0]["embedding"])

    alone = vector(model="a")
    assert vector(adapters=[{"name": "a"}, {"name": "b", "scale": 0}]) == pytest.approx(alone, abs=1e-5)
    assert vector(model="a+b") != pytest.approx(alone, abs=1e-3)


def test_a_key_needs_every_adapter_of_a_mix_and_the_base_for_scales(mixing: Mixing) -> None:
    assert mixing.post("a+b", "pair").status_code == 200
    for refused in (mixing.post("a+b", "one"), mixing.post("tiny", "one", adapters=[{"name": "a"}, {"name": "b"}])):
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")
    refused = mixing.post("a+b", "pair", adapters=[{"name": "a"}, {"name": "b", "scale": 0.5}])
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "adapters")


@pytest.mark.parametrize(
    ("model", "status", "said"),
    [
        ("a+b+c+x", 404, "'x' does not exist"),
        ("a@00000000+b", 404, "'a@00000000' does not exist"),
        ("a+b+c+d+e", 400, "at most 4"),
        ("a+", 404, "'' does not exist"),
    ],
)
def test_a_mix_that_cannot_be_served_is_refused_by_name(mixing: Mixing, model: str, status: int, said: str) -> None:
    refused = mixing.post(model, "boss")
    assert refused.status_code == status and said in refused.json()["error"]["message"]


def test_a_mix_of_too_high_a_rank_names_it(mixing: Mixing) -> None:
    """Three adapters of rank 4 fit; a fourth does not."""
    loaded = mixing.call("/v1/load_lora_adapter", "boss", {"lora_name": "d", "lora_path": "a"})
    assert loaded.status_code == 200, loaded.text
    refused = mixing.call("/v1/completions", "boss", completion("a+b+c+d"))
    assert refused.status_code == 400
    assert "ranks add up to 16, but at most 12 is supported" in refused.json()["error"]["message"]
    assert mixing.call("/v1/unload_lora_adapter", "boss", {"lora_name": "d"}).status_code == 200
    assert mixing.answer("tiny", adapters=scaled("scaled")) == mixing.answers["scaled"]


def test_a_mix_follows_a_replaced_adapter(mixing: Mixing) -> None:
    for path in ("a", "c"):
        body = {"lora_name": "x", "lora_path": path, "load_inplace": True}
        assert mixing.call("/v1/load_lora_adapter", "boss", body).status_code == 200
        same = mixing.call("/v1/completions", "boss", completion(f"{path}+b")).json()["choices"][0]["text"]
        assert mixing.call("/v1/completions", "boss", completion("x+b")).json()["choices"][0]["text"] == same
    assert mixing.call("/v1/unload_lora_adapter", "boss", {"lora_name": "x"}).status_code == 200
