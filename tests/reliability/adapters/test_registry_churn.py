"""Stored adapters loaded, divided, rolled back, unloaded and killed at random under load, against a model of the names.

Every answer is that of a version that its name had while the request ran; every operation has happened whole or not at
all, also when the server was killed in the middle of it. Run with `--slow` for 1,000 operations.
"""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.servers.adapter_server import KnownModel, completion
from tests.support.servers.server_process import REAL, ServerProcess, running

NAMES = ("n0", "n1", "n2")
NUM_CONTENTS, NUM_CLIENTS, HISTORY = 5, 4, 4
ABSENT = "absent"


@dataclass(frozen=True)
class State:
    """What the server says of a name."""

    versions: tuple[tuple[int, str], ...] = ()  # number, source
    current: int = 0
    shares: tuple[tuple[int, float], ...] = ()

    @property
    def contents(self) -> set[str]:
        """The sources that requests may get."""
        sources = dict(self.versions)
        numbers = {number for number, share in self.shares if share} or {self.current}
        return {sources.get(number, ABSENT) for number in numbers}


@dataclass
class Churn:
    http: httpx.AsyncClient
    texts: dict[str, str]  # source → answer
    states: dict[str, State]
    allowed: dict[
        str, list[set[str]]
    ]  # name → the contents that requests which run now may get, one set for each change
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[object] = field(default_factory=list)
    is_down: bool = False

    async def client(self, number: int, is_over: asyncio.Event) -> None:
        chance = random.Random(number)
        while not is_over.is_set():
            if self.is_down:
                await asyncio.sleep(0.02)
                continue
            name, user = chance.choice(NAMES), f"user {chance.randrange(20)}"
            first = len(self.allowed[name]) - 1  # changes that are over before the request do not count
            try:
                response = await self.http.post("/v1/completions", json=completion(name, user=user))
            except httpx.TransportError:
                continue  # killed
            may_get = set().union(*self.allowed[name][first:])
            if response.status_code == 404 and ABSENT in may_get:
                self.outcomes["404"] += 1
            elif response.status_code != 200:
                if not self.is_down:
                    self.wrong.append((name, response.status_code, response.text))
            elif response.json()["choices"][0]["text"] not in {self.texts.get(source) for source in may_get}:
                self.wrong.append((name, may_get, response.json()))
            else:
                self.outcomes["200"] += 1

    async def said(self, name: str) -> State:
        response = await self.http.get(f"/v1/adapters/{name}/versions")
        if response.status_code == 404:
            return State()
        record = response.json()
        versions = tuple((each["version"], each["source"]) for each in record["data"])
        shares = tuple((each["version"], each["share"]) for each in record["data"] if each["share"])
        return State(versions, record["current"], shares)

    def operation(self, chance: random.Random) -> tuple[str, str, dict[str, Any], State]:
        """A random operation: its name, route, body, and the state of the name after it."""
        name = chance.choice(NAMES)
        before, numbers = self.states[name], [number for number, _ in self.states[name].versions]
        action = chance.choice(["load", "load", "split", "split", "rollback", "unload"]) if numbers else "load"
        if action == "load":
            source = f"c{chance.randrange(NUM_CONTENTS)}"
            body = {"lora_name": name, "lora_path": source, "load_inplace": True}
            if dict(before.versions).get(before.current) == source:
                return name, "/v1/load_lora_adapter", body, State(before.versions, before.current)
            number = max(numbers, default=0) + 1
            versions = (*before.versions, (number, source))[-HISTORY:]
            return name, "/v1/load_lora_adapter", body, State(versions, number)
        if action == "unload":
            return name, "/v1/unload_lora_adapter", {"lora_name": name}, State()
        if action == "rollback":
            number = chance.choice(numbers)
            return name, f"/v1/adapters/{name}/rollback", {"version": number}, State(before.versions, number)
        chosen = chance.sample(numbers, min(len(numbers), 2))
        sources = [dict(before.versions)[number] for number in chosen]
        shares = {chosen[0]: 1.0} if len(set(sources)) == 1 else dict(zip(chosen, (0.25, 0.75), strict=True))
        body = {"shares": {str(number): share for number, share in shares.items()}}
        return (
            name,
            f"/v1/adapters/{name}/split",
            body,
            State(before.versions, before.current, tuple(sorted(shares.items()))),
        )

    async def change(self, chance: random.Random) -> None:
        name, route, body, after = self.operation(chance)
        self.allowed[name].append(self.states[name].contents | after.contents)
        response = await self.http.post(route, json=body)
        self.outcomes[route.rpartition("/")[2]] += 1
        self.states[name] = after
        self.allowed[name].append(after.contents)
        said = await self.said(name)
        if response.status_code != 200 or said != after:
            self.wrong.append((route, body, response.text, said, after))

    async def killed(self, chance: random.Random, server: ServerProcess) -> tuple[str, State, State]:
        """Kill the server in the middle of an operation; returns its name and the two states that it may have now."""
        name, route, body, after = self.operation(chance)
        self.allowed[name].append(self.states[name].contents | after.contents)
        request = asyncio.create_task(self.http.post(route, json=body))
        await asyncio.sleep(chance.random() * 0.1)
        self.is_down = True
        server.process.kill()
        await asyncio.gather(request, return_exceptions=True)
        return name, self.states[name], after


async def churn(
    flags: list[str], texts: dict[str, str], num_operations: int, num_kills: int
) -> tuple[Counter[str], list[object]]:
    chance = random.Random(7)
    states = dict.fromkeys(NAMES, State())
    outcomes: Counter[str] = Counter()
    pending: tuple[str, State, State] | None = None
    for life in range(num_kills + 1):
        with running(REAL, *flags) as server:
            limits = httpx.Limits(keepalive_expiry=2)
            async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
                state = Churn(http, texts, states, {})
                for name in NAMES:
                    said = await state.said(name)
                    possible = [states[name]] if pending is None or pending[0] != name else list(pending[1:])
                    if said not in possible:
                        return outcomes, [("after a kill", name, said, possible)]
                    states[name] = said
                    state.allowed[name] = [said.contents]
                is_over = asyncio.Event()
                clients = [asyncio.create_task(state.client(10 * life + i, is_over)) for i in range(NUM_CLIENTS)]
                for _ in range(num_operations // (num_kills + 1)):
                    await state.change(chance)
                pending = await state.killed(chance, server) if life < num_kills else None
                is_over.set()
                await asyncio.gather(*clients)
                outcomes += state.outcomes
                if state.wrong:
                    return outcomes, state.wrong
    return outcomes, []


@pytest.mark.slow
@pytest.mark.parametrize(("num_operations", "num_kills", "num_replicas"), [(30, 1, 1), (1000, 20, 1), (300, 5, 2)])
def test_no_answer_is_foreign_and_no_change_is_half(
    tmp_path: Path, num_operations: int, num_kills: int, num_replicas: int
) -> None:
    model = KnownModel.make(tmp_path)
    texts: dict[str, str] = {}
    for i in range(NUM_CONTENTS):
        seed = 100 + i
        while (text := model.add_adapter(tmp_path / "adapters" / f"c{i}", seed)[-1]) in texts.values():
            seed += 10_000
        texts[f"c{i}"] = text
    flags = ["--model", str(model.folder), "--adapter-dir", str(tmp_path / "adapters"), "--max-loras", "4"]
    flags += ["--data-dir", str(tmp_path / "data"), "--adapter-history", str(HISTORY), "--max-num-seqs", "16"]
    flags += ["--allow-local-admin", "--log-level", "warning", "--replicas", str(num_replicas)]
    flags += ["--kv-cache-memory", "64MiB"]
    outcomes, wrong = asyncio.run(churn(flags, texts, num_operations, num_kills))
    assert wrong == []
    assert outcomes["200"] > num_operations and outcomes["split"] and outcomes["rollback"]
