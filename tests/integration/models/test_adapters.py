"""Adapters over HTTP: every request its own, loaded, replaced and unloaded while others stream."""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from tests.support.cases import some
from tests.support.metric_names import check_exposition
from tests.support.servers.adapter_server import NUM_TOKENS, PROMPT, KnownModel, completion
from tests.support.servers.server_process import FAKE, REAL, ServerProcess, running

LONG = 400  # tokens; fits in the context of 512


@dataclass
class Adapted:
    server: ServerProcess
    http: httpx.Client
    folder: Path  # --adapter-dir
    answers: dict[str, list[str]]  # adapter → text after so many tokens
    long_answer: str  # of a1, LONG tokens

    def answer(self, model: str, **fields: object) -> str:
        response = self.http.post("/v1/completions", json=completion(model, **fields))
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    def load(self, name: str, path: str, **fields: object) -> httpx.Response:
        return self.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **fields})

    def unload(self, name: str) -> httpx.Response:
        return self.http.post("/v1/unload_lora_adapter", json={"lora_name": name})

    def cards(self, name: str) -> list[dict[str, object]]:
        """Of all versions under a name, the current one first."""
        return [card for card in self.http.get("/v1/adapters").json()["data"] if card["id"] == name]

    def card(self, name: str) -> dict[str, object]:
        (card,) = self.cards(name)
        return card

    def is_draining(self, name: str) -> bool:
        """Whether a version that lost its name still runs requests."""
        return [card["running"] for card in self.cards(name) if card["state"] == "draining"] == [1]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapted]:
    folder = tmp_path_factory.mktemp("adapted")
    known = KnownModel.make(folder)
    offered = folder / "adapters"
    answers = {f"a{seed}": known.add_adapter(offered / f"a{seed}", seed) for seed in (0, 2, 3, 4, 5)}
    long_answers = known.add_adapter(offered / "a1", 1, LONG)
    answers["a1"] = long_answers[: NUM_TOKENS + 1]
    answers["given"] = known.add_adapter(folder / "elsewhere", 100)
    base = known.answers(known.model)
    assert base is not None
    answers["tiny"] = base
    flags = ["--adapter-dir", str(offered), "--lora-modules", f"given={folder / 'elsewhere'}", "--max-loras", "3"]
    with running(REAL, "--model", str(known.folder), *flags, "--allow-local-admin") as server:
        with httpx.Client(base_url=server.url, timeout=30) as http:
            yield Adapted(server, http, offered, answers, long_answers[-1])


def test_requests_of_all_adapters_at_once_get_their_own_answers(adapted: Adapted) -> None:
    names = [*adapted.answers] * 6
    with ThreadPoolExecutor(16) as threads:
        texts = list(threads.map(adapted.answer, names))
    assert texts == [adapted.answers[name][-1] for name in names]
    assert len({answers[-1] for answers in adapted.answers.values()}) == len(adapted.answers)


def test_the_openai_client_streams_from_an_adapter(adapted: Adapted) -> None:
    client = openai.OpenAI(base_url=f"{adapted.server.url}/v1", api_key="unused")
    stream = client.completions.create(
        model="a1", prompt=PROMPT, max_tokens=NUM_TOKENS, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == adapted.answers["a1"][-1]
    card = client.models.retrieve("a1")
    assert {chunk.model for chunk in chunks} == {"a1"}
    assert {chunk.system_fingerprint.split("_")[2] for chunk in chunks} == {card.content_hash[:12]}
    assert card.parent == "tiny" and card.root == "a1"


def test_a_scale_of_nought_is_the_base_and_each_scale_its_own(adapted: Adapted) -> None:
    assert adapted.answer("a2", adapter_scale=0) == adapted.answers["tiny"][-1]
    assert adapted.answer("a2", adapter_scale=1) == adapted.answers["a2"][-1]
    assert len({adapted.answer("a2", adapter_scale=scale) for scale in (0.0, 0.5, 1, 2)}) == 4


def test_a_version_is_pinned_by_its_hash(adapted: Adapted) -> None:
    adapted.answer("a3")
    content_hash = adapted.card("a3")["content_hash"]
    assert adapted.answer(f"a3@{content_hash}") == adapted.answers["a3"][-1]
    for wrong in ("0" * 64, "", content_hash[:3], content_hash + "0"):
        response = adapted.http.post("/v1/completions", json=completion(f"a3@{wrong}"))
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_loading_replacing_and_unloading(adapted: Adapted) -> None:
    loaded = adapted.load("mine", "a4").json()
    assert loaded["matched"] and loaded["unmatched"] == [] and loaded["bytes"] > 0
    assert adapted.answer("mine") == adapted.answers["a4"][-1]
    again = adapted.load("mine", "a5")
    assert again.status_code == 400 and "load_inplace" in again.json()["error"]["message"]
    assert adapted.load("mine", "a5", load_inplace=True).json()["content_hash"] != loaded["content_hash"]
    assert adapted.answer("mine") == adapted.answers["a5"][-1]
    assert adapted.unload("mine").json()["freed_bytes"] == 2 * loaded["bytes"]  # CPU memory and a slot
    assert adapted.http.post("/v1/completions", json=completion("mine")).status_code == 404
    assert adapted.unload("mine").status_code == 404


def text_of(lines: Iterable[str]) -> str:
    """Of a stream that came whole."""
    *events, last = [line.removeprefix("data: ") for line in lines if line]
    assert last == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


@pytest.mark.parametrize("change", ["replaced", "unloaded"])
def test_a_running_stream_ends_on_the_version_it_began_with(adapted: Adapted, change: str) -> None:
    """Token by token, and while the name already stands for another content or for none."""
    for _ in range(20):  # on a fast machine the answer may be over before the adapter is changed
        assert adapted.load("changed", "a1").status_code == 200
        body = completion("changed", LONG, stream=True)
        with ThreadPoolExecutor(1) as thread, adapted.http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            if change == "replaced":
                assert adapted.load("changed", "a0", load_inplace=True).status_code == 200
                assert adapted.answer("changed") == adapted.answers["a0"][-1]
                was_running = adapted.is_draining("changed")
            else:  # which is answered when the stream has ended
                unloading, was_running = thread.submit(adapted.unload, "changed"), False
                while not was_running and not unloading.done():
                    was_running = adapted.is_draining("changed")
            assert text_of([first, *lines]) == adapted.long_answer
        adapted.unload("changed")
        if was_running:
            return
    raise AssertionError("every answer was over before its adapter was changed")


def test_unloading_is_answered_when_the_last_stream_has_ended(adapted: Adapted) -> None:
    loaded = adapted.load("leaving", "a0").json()
    body = completion("leaving", 100_000, stream=True, context_overflow="slide")
    with ThreadPoolExecutor(1) as thread:
        with adapted.http.stream("POST", "/v1/completions", json=body) as stream:
            events = filter(None, stream.iter_lines())
            next(events)
            unloading = thread.submit(adapted.unload, "leaving")
            wait_for(lambda: adapted.is_draining("leaving"))
            assert adapted.http.post("/v1/completions", json=completion("leaving")).status_code == 404
            for _ in range(200):
                assert '"finish_reason":null' in next(events)
            assert adapted.is_draining("leaving") and not unloading.done()
        assert unloading.result(30).json()["freed_bytes"] == 2 * loaded["bytes"]  # CPU memory and a slot
    assert adapted.cards("leaving") == []


def wait_for(what: Callable[[], bool], limit_s: float = 30) -> None:
    deadline_s = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_cards_metrics_and_log_name_adapters(adapted: Adapted) -> None:
    adapted.answer("a0")
    ids = [card["id"] for card in adapted.http.get("/v1/models").json()["data"]]
    assert ids == ["tiny", "a0", "a1", "a2", "a3", "a4", "a5", "given"]
    assert adapted.http.get("/v1/models/none").status_code == 404
    metrics = adapted.http.get("/metrics").text
    check_exposition(metrics, with_adapters=True)
    assert 'stellarbyte:adapter_resident{adapter="a0",model_name="tiny",tier="slot"} 1.0' in metrics
    assert re.search(r'stellarbyte:adapter_tokens_total\{adapter="a0",model_name="tiny"\} [1-9]', metrics)
    assert re.search(
        r'vllm:lora_requests_info\{max_lora="3",model_name="tiny",running_lora_adapters="",waiting', metrics
    )
    assert re.search(r"stellarbyte:adapter_load_seconds_count\S* [1-9]", metrics)
    assert f" adapter=a0@{adapted.card('a0')['content_hash'][:12]} " in adapted.server.log()
    assert str(adapted.folder) not in metrics


REFUSED = [
    ({"lora_name": "x", "lora_path": "nothing"}, 404, "lora_path"),
    ({"lora_name": "x", "lora_path": "../elsewhere"}, 404, "lora_path"),
    ({"lora_name": "x", "lora_path": "/etc"}, 404, "lora_path"),
    ({"lora_name": "x", "lora_path": "https://example.com/a"}, 404, "lora_path"),
    ({"lora_name": "x", "lora_path": "a\0b"}, 404, "lora_path"),
    ({"lora_name": "x", "lora_path": "y" * 5000}, 400, "lora_path"),
    ({"lora_name": "x@y", "lora_path": "a0"}, 400, "lora_name"),
    ({"lora_name": "../x", "lora_path": "a0"}, 400, "lora_name"),
    ({"lora_name": "tiny", "lora_path": "a0"}, 400, "lora_name"),
    ({"lora_name": "x" * 200, "lora_path": "a0"}, 400, "lora_name"),
    ({"lora_name": 5, "lora_path": "a0"}, 400, "lora_name"),
    ({"lora_name": "x"}, 400, "lora_path"),
    ({"lora_name": "x", "lora_path": "a0", "force": True}, 400, "force"),
    ({"lora_name": "x", "lora_path": "a0", "load_inplace": 1}, 400, "load_inplace"),
]


@pytest.mark.parametrize(("body", "status", "param"), REFUSED)
def test_what_cannot_be_loaded_is_refused_by_field(
    adapted: Adapted, body: dict[str, object], status: int, param: str
) -> None:
    response = adapted.http.post("/v1/load_lora_adapter", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


@pytest.mark.parametrize(
    ("model", "scale"), [("a0", -0.1), ("a0", 8.5), ("a0", "1"), ("a0", True), ("a0", [1]), ("tiny", 2)]
)
def test_impossible_scales_are_refused(adapted: Adapted, model: str, scale: object) -> None:
    response = adapted.http.post("/v1/completions", json=completion(model, adapter_scale=scale))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "adapter_scale")


def test_the_operators_routes_want_json_and_this_machines_name(adapted: Adapted) -> None:
    """A web page that the operator looks at could otherwise send these."""
    url, body = "/v1/unload_lora_adapter", '{"lora_name": "a0"}'
    plain = adapted.http.post(url, content=body, headers={"Content-Type": "text/plain"})
    assert plain.status_code == 400 and "Content-Type" in plain.json()["error"]["message"]
    rebound = adapted.http.post(url, content=body, headers={"Content-Type": "application/json", "Host": "evil.test"})
    assert (rebound.status_code, rebound.json()["error"]["type"]) == (403, "permission_error")
    assert adapted.answer("a0") == adapted.answers["a0"][-1]


def test_every_http_process_knows_what_another_loaded(adapted: Adapted) -> None:
    model, body = str(adapted.folder.parent / "tiny"), completion("x")
    flags = ["--adapter-dir", str(adapted.folder), "--http-workers", "2", "--allow-local-admin"]
    with running(REAL, "--model", model, *flags) as server:
        loaded = httpx.post(f"{server.url}/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "a1"})
        assert loaded.status_code == 200
        for _ in range(16):  # a connection each, which Linux spreads over both
            answer = httpx.post(f"{server.url}/v1/completions", json=body)
            assert answer.json()["choices"][0]["text"] == adapted.answers["a1"][-1]
        assert {word for word in server.log().split() if word.startswith("http-")} == {"http-1", "http-2"}


def test_with_an_admin_key_nothing_else_opens_the_operators_routes(fake_model: str) -> None:
    with running(FAKE, "--model", fake_model, "--admin-api-key", "sesame") as server:
        url, body = f"{server.url}/v1/unload_lora_adapter", {"lora_name": "x"}
        for header in (None, "Bearer", "Bearer wrong", "Basic sesame", "sesame", "Bearer sesamé"):
            headers = {} if header is None else {"Authorization": header.encode("latin-1")}
            response = httpx.post(url, json=body, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        response = httpx.post(url, json=body, headers={"Authorization": "Bearer sesame"})
        assert response.status_code == 400 and "no adapters" in response.json()["error"]["message"]
        assert "sesame" not in server.log()


@pytest.mark.parametrize(
    ("name", "said"), some([("broken", "'lora_bias' is True"), ("absent", "holds no adapter_config.json")], 0)
)
def test_a_broken_module_stops_the_start_with_one_line(tmp_path: Path, adapted: Adapted, name: str, said: str) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_bias": true}')
    (broken / "adapter_model.safetensors").write_bytes(b"")
    model = str(adapted.folder.parent / "tiny")
    server = ServerProcess(REAL, "--model", model, "--lora-modules", f"x={tmp_path / name}")
    try:
        assert server.wait(60) == 1
        assert said in server.log() and "Traceback" not in server.log()
    finally:
        server.stop()
