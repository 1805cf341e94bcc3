"""Adapters loaded, replaced and unloaded at random under load: every token comes from the right one.

Run with `--slow` for the long form (64 adapters, 32 clients × 256 requests); without it there are 16, and each client
sends fewer.
"""

import asyncio
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.support.servers.adapter_server import NUM_TOKENS, KnownModel, completion
from tests.support.servers.processes import resident_bytes
from tests.support.servers.server_process import REAL, ServerProcess, running

NUM_SLOTS, NUM_CLIENTS = 4, 32
MIN_TOKENS = 6  # of an answer: enough to tell whose it is
MAX_GROWTH_BYTES = 32 * 2**20


@dataclass
class Churn:
    """What clients and operators know of each other."""

    http: httpx.AsyncClient
    answers: dict[str, list[str]]  # first digits of the content hash → text after so many tokens
    contents: dict[str, set[str]]  # name → first digits of the hashes it may have
    num_names: int
    absent: set[str] = field(default_factory=set)  # names that may be unloaded just now
    changes: Counter[str] = field(default_factory=Counter)  # name → times it was touched
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[object] = field(default_factory=list)

    async def client(self, number: int, num_requests: int) -> None:
        chance = random.Random(number)
        for _ in range(num_requests):
            popular = int(chance.expovariate(5 / self.num_names))  # some are asked for more than others
            name = f"n{min(popular, self.num_names - 1)}"
            count = chance.randint(MIN_TOKENS, NUM_TOKENS)
            may_be_absent, changes = name in self.absent, self.changes[name]
            response = await self.http.post("/v1/completions", json=completion(name, count))
            if response.status_code == 404 and (may_be_absent or name in self.absent or changes != self.changes[name]):
                self.outcomes["404"] += 1
                continue
            if response.status_code != 200:
                self.wrong.append((name, response.status_code, response.text))
                continue
            answer = response.json()
            content = answer["system_fingerprint"].split("_")[2]
            if content not in self.contents[name] or answer["choices"][0]["text"] != self.answers[content][count]:
                self.wrong.append((name, answer))
            self.outcomes["200"] += 1

    async def operator(self, number: int, is_over: asyncio.Event) -> None:
        chance = random.Random(-number)
        while not is_over.is_set():
            name = f"n{number + 4 * chance.randrange(self.num_names // 4)}"  # each has names of its own
            action = chance.choice(["replace", "replace", "unload and load"])
            if action == "unload and load":
                self.absent.add(name)
                await self.call("unload_lora_adapter", lora_name=name)
            path = chance.choice([name, f"others/{name}"])
            await self.call("load_lora_adapter", lora_name=name, lora_path=path, load_inplace=True)
            self.absent.discard(name)
            self.changes[name] += 1
            await asyncio.sleep(chance.random() * 0.05)

    async def call(self, route: str, **body: object) -> None:
        response = await self.http.post(f"/v1/{route}", json=body)
        self.outcomes[f"{route} {response.status_code}"] += 1
        if response.status_code != 200:
            self.wrong.append((route, body, response.text))


@pytest.fixture(scope="module")
def known(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> tuple[Path, Path, dict[str, list[str]]]:
    """A model folder, a folder of adapters, and by place in it the answers."""
    folder = tmp_path_factory.mktemp("churn")
    model = KnownModel.make(folder)
    answers = {}
    for i in range(64 if pytestconfig.getoption("--slow") else 16):
        for place, seed in ((f"n{i}", i), (f"others/n{i}", 1000 + i)):
            told = {texts[MIN_TOKENS] for texts in answers.values()}
            while (texts := model.add_adapter(folder / "adapters" / place, seed))[MIN_TOKENS] in told:
                seed += 10_000  # bytes that are no character look alike, so two may have the same text
            answers[place] = texts
    return model.folder, folder / "adapters", answers


async def churn(server: ServerProcess, by_place: dict[str, list[str]], num_requests: int) -> tuple[Churn, list[int]]:
    """Load every content once to learn its hash, then let clients and operators loose; the engine's size meanwhile."""
    # Fewer seconds than the server keeps an idle connection, which it might close just when it is used again.
    limits = httpx.Limits(max_connections=100, keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as http:
        state = Churn(http, {}, defaultdict(set), len(by_place) // 2)
        for place, texts in by_place.items():
            name = place.rpartition("/")[2]
            body = {"lora_name": name, "lora_path": place, "load_inplace": True}
            content = (await http.post("/v1/load_lora_adapter", json=body)).json()["content_hash"][:12]
            state.answers[content] = texts
            state.contents[name].add(content)
        is_over, sizes = asyncio.Event(), []
        operators = [asyncio.create_task(state.operator(number, is_over)) for number in range(4)]
        for part in range(4):
            clients = [state.client(100 * part + number, num_requests // 4) for number in range(NUM_CLIENTS)]
            await asyncio.gather(*clients)
            sizes.append(resident_bytes(server.engine_pid()))
        is_over.set()
        await asyncio.gather(*operators)
        cards = (await http.get("/v1/adapters")).json()["data"]
        assert {(card["running"], card["waiting"], card["state"]) for card in cards} == {(0, 0, "ready")}
        for card in cards:
            await state.call("unload_lora_adapter", lora_name=card["id"])
        left = (await http.get("/v1/adapters")).json()["data"]
        assert [card for card in left if card["bytes"]] == []
        return state, sizes


@pytest.mark.slow
@pytest.mark.parametrize("num_requests", [8, 256])
def test_churn(known: tuple[Path, Path, dict[str, list[str]]], num_requests: int) -> None:
    model, adapters, by_place = known
    flags = ["--model", str(model), "--adapter-dir", str(adapters), "--max-loras", str(NUM_SLOTS)]
    with running(REAL, *flags, "--max-num-seqs", "16", "--allow-local-admin", "--log-level", "warning") as server:
        started_s = time.perf_counter()
        state, sizes = asyncio.run(churn(server, by_place, num_requests))
        assert state.wrong == []
        assert state.outcomes["200"] > 0.8 * NUM_CLIENTS * num_requests
        assert server.metric("vllm:kv_cache_usage_perc") == 0
        assert sizes[-1] - sizes[0] < MAX_GROWTH_BYTES
        growth = (sizes[-1] - sizes[0]) / 2**20
        print(f"{dict(state.outcomes)} in {time.perf_counter() - started_s:.0f} s, memory {growth:+.1f} MiB")


@pytest.mark.slow
def test_a_swapped_adapter_would_be_noticed(known: tuple[Path, Path, dict[str, list[str]]]) -> None:
    """The control: with the answers of two adapters exchanged the churn finds wrong tokens."""
    model, adapters, by_place = known
    swapped = by_place | {"n0": by_place["n1"], "n1": by_place["n0"]}
    flags = ["--model", str(model), "--adapter-dir", str(adapters), "--max-loras", str(NUM_SLOTS)]
    with running(REAL, *flags, "--allow-local-admin", "--log-level", "warning") as server:
        state, _ = asyncio.run(churn(server, swapped, 8))
        assert state.wrong
