"""Minutes of mixed traffic with clients that leave and an adapter that is replaced every second: right and flat.

Ten minutes with `--slow`, some seconds without. Figures are shown with -s.
"""

import asyncio
import itertools
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.adapter_server import NUM_TOKENS, KnownModel, completion
from tests.reliability.test_cut_requests import settled
from tests.server_process import REAL, ServerProcess, running

NUM_CLIENTS = 12
SHARE_LEAVING = 0.05
WARM_UP_SHARE = 0.25  # of the time, before which memory is not compared
MAX_GROWTH_BYTES = 50 * 2**20
MAX_WRONG_SHARE = 1e-4
MAX_MORE_HELD = 4  # descriptors or threads: of those that answer metrics and files now and then


@dataclass
class Soak:
    """`answers` has what may be said under a name: that of the model, or of what an adapter is replaced by in turn."""

    http: httpx.AsyncClient
    answers: dict[str, set[str]]
    ends_at_s: float
    num_right: int = 0
    num_left: int = 0
    num_swaps: int = 0
    wrong: list[str] = field(default_factory=list)

    async def client(self, number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < self.ends_at_s:
            name = chance.choice(list(self.answers))
            if chance.random() < SHARE_LEAVING:
                await self._leave(name, chance)
                continue
            response = await self.http.post("/v1/completions", json=completion(name))
            text = response.json()["choices"][0]["text"] if response.status_code == 200 else response.text
            if text in self.answers[name]:
                self.num_right += 1
            else:
                self.wrong.append(text)

    async def _leave(self, name: str, chance: random.Random) -> None:
        body = completion(name, 400, stream=True)
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            await asyncio.sleep(chance.random() * 0.05)
            assert response.status_code == 200
        self.num_left += 1

    async def operator(self) -> None:
        for path in itertools.cycle(["one", "other"]):
            await self.swap(path)
            if time.monotonic() > self.ends_at_s:
                return
            await asyncio.sleep(1)

    async def swap(self, path: str) -> None:
        body = {"lora_name": "swapped", "lora_path": path, "load_inplace": True}
        response = await self.http.post("/v1/load_lora_adapter", json=body)
        assert response.status_code == 200, response.text
        self.num_swaps += 1


async def soak(server: ServerProcess, answers: dict[str, set[str]], seconds: float) -> Soak:
    limits = httpx.Limits(max_connections=100, keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as http:
        state = Soak(http, answers, time.monotonic() + seconds)
        await state.swap("other")
        await asyncio.gather(state.operator(), *(state.client(number) for number in range(NUM_CLIENTS)))
        return state


def engine_bytes(server: ServerProcess) -> int:
    """Resident memory of both processes."""
    pids = (server.process.pid, server.engine_pid())
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 for pid in pids)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, set[str]]]:
    """Flags of a server, and what it may answer."""
    folder = tmp_path_factory.mktemp("soak")
    model = KnownModel.make(folder)
    texts = {name: model.add_adapter(folder / "adapters" / name, seed)[NUM_TOKENS] for seed, name in enumerate(
        ["fixed", "one", "other"], 1
    )}  # fmt: skip
    assert len(set(texts.values())) == len(texts)
    flags = [
        "--model",
        str(model.folder),
        "--adapter-dir",
        str(folder / "adapters"),
        "--max-num-seqs",
        "8",
        "--allow-local-admin",
    ]
    return flags, {"fixed": {texts["fixed"]}, "swapped": {texts["one"], texts["other"]}}


@pytest.mark.parametrize("seconds", [12, pytest.param(600, marks=pytest.mark.slow)])
def test_soak(known: tuple[list[str], dict[str, set[str]]], seconds: float) -> None:
    flags, answers = known
    with running(REAL, *flags, "--log-level", "warning", limit_s=120) as server:
        asyncio.run(soak(server, answers, WARM_UP_SHARE * seconds))
        held, size = settled(server), engine_bytes(server)
        state = asyncio.run(soak(server, answers, (1 - WARM_UP_SHARE) * seconds))
        more = {name: count - held[name] for name, count in settled(server).items()}
        growth = engine_bytes(server) - size
        log = server.log()
    print(
        f"\n{state.num_right} right, {len(state.wrong)} wrong, {state.num_left} left, {state.num_swaps} swaps;"
        f" memory {growth / 2**20:+.1f} MiB; {more}"
    )
    assert len(state.wrong) <= MAX_WRONG_SHARE * state.num_right, state.wrong[:3]
    assert state.num_right > 10 * seconds / 12 and state.num_left and state.num_swaps
    assert growth <= MAX_GROWTH_BYTES
    assert all(count <= MAX_MORE_HELD for count in more.values()), more
    assert "Traceback" not in log


def test_a_wrong_adapter_would_be_found(known: tuple[list[str], dict[str, set[str]]]) -> None:
    """The control: with one of the two contents unknown, its answers are wrong."""
    flags, answers = known
    exchanged = {"fixed": answers["swapped"], "swapped": answers["fixed"]}
    with running(REAL, *flags, "--log-level", "warning", limit_s=120) as server:
        assert asyncio.run(soak(server, exchanged, 2)).wrong
