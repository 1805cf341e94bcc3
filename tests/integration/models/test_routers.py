"""What routers and operators see of a real server: pinned adapters, residency, events of the cache, cached tokens."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.clients.event_subscriber import EventSubscriber
from tests.support.servers.adapter_server import KnownModel, completion
from tests.support.servers.server_process import REAL, ServerProcess, free_port, running

BLOCK = 4
KEY = "key-of-a-user"


@dataclass
class Routed:
    server: ServerProcess
    users: httpx.Client
    operators: httpx.Client  # at --admin-listen, without a key
    subscriber: EventSubscriber

    def load(self, name: str, path: str, **fields: object) -> httpx.Response:
        return self.operators.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **fields})

    def cached_tokens(self, model: str, prompt: list[int], **fields: object) -> int:
        """How many tokens of a prompt were in the cache, by the answer."""
        response = self.users.post("/v1/completions", json=completion(model, 1, prompt=prompt, **fields))
        assert response.status_code == 200, response.text
        return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    def series(self, name: str) -> list[tuple[dict[str, str], float]]:
        text = self.users.get("/metrics").text
        return [
            ({label: value for label, value in sample.labels.items() if label != "model_name"}, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        ]

    def loaded(self) -> dict[str, tuple[str, str, str]]:
        found = self.series("vllm:lora_adapter_loaded")
        assert all(value == 1 for _, value in found)
        return {labels["adapter_name"]: (labels["level"], labels["pinned"], labels["rank"]) for labels, _ in found}


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Routed]:
    folder = tmp_path_factory.mktemp("routed")
    known = KnownModel.make(folder)
    for seed in range(3):
        known.add_adapter(folder / "adapters" / f"a{seed}", seed)
    ports = [free_port() for _ in range(3)]
    flags = ["--model", str(known.folder), "--adapter-dir", str(folder / "adapters"), "--max-loras", "2"]
    flags += ["--block-size", str(BLOCK), "--sink-tokens", "0", "--kv-cache-memory", "1MiB", "--api-key", KEY]
    flags += ["--admin-listen", f"127.0.0.1:{ports[0]}", "--kv-events", f"tcp://127.0.0.1:{ports[1]}"]
    flags += ["--kv-events-replay", f"tcp://127.0.0.1:{ports[2]}", "--kv-events-topic", "kv@here@tiny"]
    with running(REAL, *flags) as server:
        subscriber = EventSubscriber(f"tcp://127.0.0.1:{ports[1]}", f"tcp://127.0.0.1:{ports[2]}", b"kv@here@tiny")
        users = httpx.Client(base_url=server.url, timeout=30, headers={"Authorization": f"Bearer {KEY}"})
        operators = httpx.Client(base_url=f"http://127.0.0.1:{ports[0]}", timeout=30)
        with users, operators:
            yield Routed(server, users, operators, subscriber)
        subscriber.close()


def test_a_pinned_adapter_stays_in_its_slot_and_metrics_follow(routed: Routed) -> None:
    assert routed.loaded() == {}
    assert routed.series("vllm:num_gpu_loaded_lora_adapters") == [({}, 0)]
    assert routed.series("vllm:max_gpu_lora_adapters") == [({}, 2)]
    loaded = routed.load("mine", "a0", pinned=True, base_model_name="tiny").json()
    assert loaded["pinned"] is True
    for name in ("a1", "a2", "a1"):
        routed.cached_tokens(name, [50])
        assert routed.loaded()["mine"] == ("gpu", "true", "4")
        assert routed.loaded()[name] == ("gpu", "false", "4")
    assert routed.loaded()["a2"] == ("cpu", "false", "4"), "evicted from the slot"
    assert routed.series("vllm:num_gpu_loaded_lora_adapters") == [({}, 2)]
    assert routed.series("vllm:num_cpu_loaded_lora_adapters") == [({}, 3)]
    (_, loads), *_ = routed.series("vllm:lora_adapter_load_seconds_count")
    assert loads == 3
    (card,) = [card for card in routed.operators.get("/v1/adapters").json()["data"] if card["id"] == "mine"]
    assert card["pinned"] is True and card["tier"] == "slot"
    refused = routed.load("other", "a1", pinned=True)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "pinned"
    assert routed.operators.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 200
    assert "mine" not in routed.loaded()
    assert routed.series("vllm:num_gpu_loaded_lora_adapters") == [({}, 1)]


def test_another_base_model_is_refused(routed: Routed) -> None:
    refused = routed.load("mine", "a0", base_model_name="llama")
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "base_model_name"
    assert "'tiny'" in refused.json()["error"]["message"] and "'llama'" in refused.json()["error"]["message"]
    assert "mine" not in routed.loaded()


def test_the_cache_is_described_as_the_engine_has_it(routed: Routed) -> None:
    ((labels, value),) = routed.series("vllm:cache_config_info")
    logged = re.search(r"KV cache: (\d+) blocks of (\d+) tokens", routed.server.log())
    assert logged is not None
    assert (labels["num_gpu_blocks"], labels["block_size"], value) == (logged[1], logged[2], 1)
    assert labels["enable_prefix_caching"] == "True" and labels["cache_dtype"] == "float32"


def test_events_foretell_which_tokens_of_a_prompt_are_cached(routed: Routed) -> None:
    prompt = list(range(40, 61))
    salt = '["key", "api-key-1", "%s"]'
    contents = {card["id"]: card["content_hash"] for card in routed.users.get("/v1/adapters").json()["data"]}
    for model, scale, given in (("tiny", 1, ""), ("a1", 1, ""), ("a1", 0.5, ""), ("tiny", 1, "mine"), ("a2", 1, "x")):
        fields = {"adapter_scale": scale} | ({"cache_salt": given} if given else {})
        assert routed.cached_tokens(model, prompt, **fields) == 0, "each has blocks of its own"
        for length, hit in ((21, 20), (14, 12), (3, 0)):
            (_, batches), *_ = routed.series("stellarbyte:kv_event_batches_total")
            routed.subscriber.follow(int(batches))
            name = None if model == "tiny" else model
            keys = [] if name is None else [name, contents[name], float(scale)]
            forecast = routed.subscriber.cached_tokens(prompt[: length - 1], name, [*keys, salt % given])
            assert routed.cached_tokens(model, prompt[:length], **fields) == forecast == hit
    assert routed.series("stellarbyte:kv_event_batches_dropped_total") == [({}, 0)]
    assert routed.subscriber.seen[0] == {"type": "AllBlocksCleared"} and routed.subscriber.ranks == {0}
    assert {event["medium"] for event in routed.subscriber.seen[1:]} == {"CPU"}
    stored = {event["lora_name"] for event in routed.subscriber.seen[1:] if event["type"] == "BlockStored"}
    assert stored >= {None, "a1", "a2"}  # also those of probes, of adapters that were loaded
