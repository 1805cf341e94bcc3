"""Loads, unloads, rollbacks and splits at random over two replicas that are killed at random: no foreign answer, no
change by half.

Run with `--slow` for the long form (1,000 operations); without it there are 60.
"""

import asyncio
import os
import random
import signal
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.support.servers.adapter_server import NUM_TOKENS, KnownModel, completion
from tests.support.servers.processes import child_pids
from tests.support.servers.server_process import REAL, ServerProcess, running

ENGINE = "stellarbyte_server.engine.process"
NUM_NAMES, NUM_CLIENTS, NUM_REPLICAS = 4, 6, 2
MIN_TOKENS = 6
PATHS = [f"{place}{number}" for place in ("n", "m") for number in range(NUM_NAMES)]
OF_A_DEAD_ENGINE = (500, 503)


class Churn:
    """What the operator has done, and what clients get meanwhile.

    `history` has for each name the contents that it might have, one after the other: one content, or two while it
    changes; None: it has no adapter.
    """

    def __init__(self, server: ServerProcess, http: httpx.AsyncClient, by_path: dict[str, list[str]]) -> None:
        self.server = server
        self.http = http
        self.by_path = by_path
        self.history: dict[str, list[set[str | None]]] = {f"x{number}": [{None}] for number in range(NUM_NAMES)}
        self.versions: dict[str, list[str]] = {name: [] for name in self.history}  # contents by number, from 1
        self.num_kills = 0
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[object] = []

    async def ask(self, name: str, num_tokens: int) -> None:
        """A request whose answer must be one that its name could have while it ran."""
        history, num_kills = self.history[name], self.num_kills
        number = len(history) - 1
        answer = await self.http.post("/v1/completions", json=completion(name, num_tokens))
        allowed = set().union(*history[number:])
        self.outcomes[str(answer.status_code)] += 1
        if answer.status_code in OF_A_DEAD_ENGINE and self.num_kills:
            assert num_kills <= self.num_kills
            return
        if answer.status_code == 404:
            if None not in allowed:
                self.wrong.append((name, allowed, answer.text))
            return
        texts = [self.by_path[path][num_tokens] for path in allowed if path is not None]
        if answer.status_code != 200 or answer.json()["choices"][0]["text"] not in texts:
            self.wrong.append((name, allowed, answer.text))

    async def client(self, number: int, is_over: asyncio.Event) -> None:
        chance = random.Random(number)
        while not is_over.is_set():
            await self.ask(f"x{chance.randrange(NUM_NAMES)}", chance.randint(MIN_TOKENS, NUM_TOKENS))

    async def change(self, name: str, action: str, chance: random.Random) -> None:
        """Load, unload, roll back or split, and then see that every replica has the same."""
        history, before, versions = self.history[name], self.history[name][-1], self.versions[name]
        allowed: set[str | None] = {None}
        route, body = "unload_lora_adapter", {"lora_name": name}
        after: list[str] = []
        if action == "load":
            path = chance.choice(PATHS)
            allowed, after = {path}, [*versions, path]
            route, body = "load_lora_adapter", body | {"lora_path": path, "load_inplace": True}
        elif action == "rollback" and versions:
            number = chance.choice(await self._numbers(name))
            allowed, after = {versions[number - 1]}, versions
            route, body = f"adapters/{name}/rollback", {"version": number}
        elif action == "split" and versions:
            numbers = await self._numbers(name)
            by_content = {versions[number - 1]: number for number in numbers}
            pair = chance.sample(sorted(by_content), min(2, len(by_content)))
            shares = {str(by_content[path]): 1 / len(pair) for path in pair}
            allowed, after = set(pair), versions
            route, body = f"adapters/{name}/split", {"shares": shares}
        history.append(before | allowed)
        answer = await self.http.post(f"/v1/{route}", json=body)
        self.outcomes[f"{action} {answer.status_code}"] += 1
        if answer.status_code == 200 or (answer.status_code == 404 and before == allowed == {None}):
            history.append(allowed)
            is_again = action == "load" and answer.json()["version"] <= len(versions)  # the current content
            self.versions[name] = versions if is_again else after
        elif answer.status_code in OF_A_DEAD_ENGINE and self.num_kills:
            history.append(before)
        else:
            self.wrong.append((name, action, body, answer.text))
        await asyncio.gather(*(self.ask(name, NUM_TOKENS) for _ in range(2 * NUM_REPLICAS)))
        await self.ask_one_caller(name)

    async def _numbers(self, name: str) -> list[int]:
        """The versions in a name's history."""
        answer = await self.http.get(f"/v1/adapters/{name}/versions")
        assert answer.status_code == 200, answer.text
        return [version["version"] for version in answer.json()["data"]]

    async def ask_one_caller(self, name: str) -> None:
        """The same caller at every replica: it has one version."""
        body = completion(name, NUM_TOKENS, user="ann")
        answers = await asyncio.gather(*(self.http.post("/v1/completions", json=body) for _ in range(2 * NUM_REPLICAS)))
        texts = {answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200}
        if len(texts) > 1:
            self.wrong.append((name, "one caller", texts))

    async def kill(self, chance: random.Random) -> None:
        engines = child_pids(self.server, ENGINE)
        health = await self.http.get("/health")
        if len(engines) == NUM_REPLICAS and health.json().get("status") == "ok":  # never the last one
            self.num_kills += 1
            os.kill(chance.choice(engines), signal.SIGKILL)
            self.outcomes["kill"] += 1

    async def operate(self, num_operations: int) -> None:
        chance = random.Random(7)
        for number in range(num_operations):
            name = f"x{chance.randrange(NUM_NAMES)}"
            action = chance.choices(["load", "unload", "rollback", "split", "kill"], [6, 2, 3, 3, 2])[0]
            if action == "kill" or number == num_operations // 2:
                await self.kill(chance)
            else:
                await self.change(name, action, chance)

    async def until_whole(self) -> None:
        async with asyncio.timeout(120):
            while (await self.http.get("/health")).json().get("status") != "ok":
                await asyncio.sleep(0.1)


async def churn(server: ServerProcess, by_path: dict[str, list[str]], num_operations: int) -> Churn:
    limits = httpx.Limits(max_connections=100, keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
        state, is_over = Churn(server, http, by_path), asyncio.Event()
        clients = [asyncio.create_task(state.client(number, is_over)) for number in range(NUM_CLIENTS)]
        await state.operate(num_operations)
        is_over.set()
        await asyncio.gather(*clients)
        await state.until_whole()
        for name in state.history:
            await asyncio.gather(*(state.ask(name, NUM_TOKENS) for _ in range(3 * NUM_REPLICAS)))
        cards = {card["id"]: card for card in (await http.get("/v1/adapters")).json()["data"]}
        assert {name for name in state.history if name in cards} == {
            name for name, history in state.history.items() if history[-1] != {None}
        }
        assert {(card["running"], card["waiting"]) for card in cards.values()} <= {(0, 0)}
        return state


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[KnownModel, dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("replica-churn")
    model = KnownModel.make(folder)
    answers: dict[str, list[str]] = {}
    for seed, path in enumerate(PATHS):
        told = {texts[MIN_TOKENS] for texts in answers.values()}
        while (texts := model.add_adapter(folder / "adapters" / path, seed))[MIN_TOKENS] in told:
            seed += 10_000  # bytes that are no character look alike, so two may have the same text
        answers[path] = texts
    return model, answers


def flags_of(model: KnownModel) -> list[str]:
    folder: Path = model.folder.parent / "adapters"
    flags = ["--model", str(model.folder), "--adapter-dir", str(folder), "--max-loras", "3", "--replicas", "2"]
    return [*flags, "--restart-engine", "1000", "--allow-local-admin", "--kv-cache-memory", "64MiB"]


@pytest.mark.slow
@pytest.mark.parametrize("num_operations", [60, 1000])
def test_churn_over_replicas(known: tuple[KnownModel, dict[str, list[str]]], num_operations: int) -> None:
    model, by_path = known
    with running(REAL, *flags_of(model), "--log-level", "warning") as server:
        state = asyncio.run(churn(server, by_path, num_operations))
        print(dict(state.outcomes))
        assert state.wrong == []
        assert state.num_kills and state.outcomes["200"] > num_operations
        assert "Traceback" not in server.log(), server.log()


@pytest.mark.slow
def test_a_foreign_answer_would_be_noticed(known: tuple[KnownModel, dict[str, list[str]]]) -> None:
    """The control: with the answers of two adapters exchanged the churn finds wrong ones."""
    model, by_path = known
    swapped = by_path | {"n0": by_path["n1"], "n1": by_path["n0"]}
    with running(REAL, *flags_of(model), "--log-level", "warning") as server:
        assert asyncio.run(churn(server, swapped, 60)).wrong
