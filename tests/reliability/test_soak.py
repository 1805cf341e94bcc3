"""Minutes of mixed traffic with clients that leave and an adapter that is replaced every second: right and flat.

Ten minutes with `--slow`, some seconds without. Figures are shown with -s.
"""

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import pytest

from tests.support.over_http import wait_until_idle
from tests.support.servers.adapter_server import NUM_TOKENS, KnownModel, completion
from tests.support.servers.processes import resident_bytes, settled
from tests.support.servers.server_process import REAL, ServerProcess, running

NUM_CLIENTS = 12
SHARE_LEAVING = 0.05
WARM_UP_SHARE = 0.25  # of the time, before which memory is not compared
MAX_GROWTH_BYTES = 16 * 2**20
MAX_MORE_HELD = 4  # descriptors or threads: of those that answer metrics and files now and then


@dataclass
class Soak:
    """`texts` has the answer of each content, by the first digits of its hash."""

    http: httpx.AsyncClient
    texts: dict[str, str]
    contents: dict[str, str]  # place of an adapter → first digits of its hash
    ends_at_s: float
    swaps: list[str] = field(default_factory=list)  # contents that `swapped` got, one after the other
    num_sure: int = 0  # of these: the server has said so
    right: Counter[str] = field(default_factory=Counter)  # by content
    left: Counter[str] = field(default_factory=Counter)  # the same, of streams that were not read to the end
    wrong: list[object] = field(default_factory=list)

    async def client(self, number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < self.ends_at_s:
            name = chance.choice(["fixed", "swapped"])
            num_sure = self.num_sure
            if chance.random() < SHARE_LEAVING:
                content, text = await self._begin(name, chance)
                whole = self.texts.get(content, "").rstrip("\ufffd")  # bytes that what follows may make a character
                is_right, counted = text.startswith(whole) or whole.startswith(text), self.left
            else:
                content, text = await self._ask(name)
                is_right, counted = text == self.texts.get(content), self.right
            # Not the content of a version that had been replaced when the request was sent.
            allowed = {self.contents["fixed"]} if name == "fixed" else set(self.swaps[num_sure - 1 :])
            if is_right and content in allowed:
                counted[content] += 1
            else:
                self.wrong.append((name, content, text))

    async def _ask(self, name: str) -> tuple[str, str]:
        """The content that answered, and its text."""
        response = await self.http.post("/v1/completions", json=completion(name))
        if response.status_code != 200:
            return "", response.text
        answer = response.json()
        return answer["system_fingerprint"].split("_")[2], answer["choices"][0]["text"]

    async def _begin(self, name: str, chance: random.Random) -> tuple[str, str]:
        """The same of a stream that is left after a while."""
        content, text, until_s = "", "", time.monotonic() + chance.random() * 0.05
        body = completion(name, 400, stream=True)
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                return "", str(response.status_code)
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    content = event["system_fingerprint"].split("_")[2]
                    text += event["choices"][0]["text"]
                if time.monotonic() > until_s and content:
                    break
        return content, text

    async def operator(self) -> None:
        while time.monotonic() < self.ends_at_s:
            for path in ("one", "other"):
                await self.swap(path)
                await asyncio.sleep(1)

    async def swap(self, path: str) -> None:
        self.swaps.append(self.contents[path])
        await load(self.http, "swapped", path)
        self.num_sure = len(self.swaps)


async def load(http: httpx.AsyncClient, name: str, path: str) -> str:
    """The first digits of the hash."""
    body = {"lora_name": name, "lora_path": path, "load_inplace": True}
    response = await http.post("/v1/load_lora_adapter", json=body)
    assert response.status_code == 200, response.text
    return response.json()["content_hash"][:12]


async def soak(server: ServerProcess, texts: dict[str, str], seconds: float) -> Soak:
    """`texts`: by the adapter's place."""
    limits = httpx.Limits(max_connections=100, keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as http:
        contents = {place: await load(http, "swapped", place) for place in texts}
        by_content = {contents[place]: text for place, text in texts.items()}
        state = Soak(http, by_content, contents, time.monotonic() + seconds)
        await state.swap("other")
        await asyncio.gather(state.operator(), *(state.client(number) for number in range(NUM_CLIENTS)))
        return state


def resident(server: ServerProcess) -> int:
    """Bytes of both processes."""
    return resident_bytes(server.process.pid) + resident_bytes(server.engine_pid())


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, str]]:
    """Flags of a server, and what its adapters answer, by their places."""
    folder = tmp_path_factory.mktemp("soak")
    model = KnownModel.make(folder)
    texts = {name: model.add_adapter(folder / "adapters" / name, seed)[NUM_TOKENS] for seed, name in enumerate(
        ["fixed", "one", "other"], 1
    )}  # fmt: skip
    assert len(set(texts.values())) == len(texts)
    flags = ["--model", str(model.folder), "--adapter-dir", str(folder / "adapters"), "--max-num-seqs", "8"]
    return [*flags, "--allow-local-admin"], texts


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [12, 600])
def test_soak(known: tuple[list[str], dict[str, str]], seconds: float) -> None:
    flags, texts = known
    with running(REAL, *flags, "--log-level", "warning") as server:
        asyncio.run(soak(server, texts, WARM_UP_SHARE * seconds))
        held, size = settled(server), resident(server)
        state = asyncio.run(soak(server, texts, (1 - WARM_UP_SHARE) * seconds))
        wait_until_idle(server, limit_s=10)
        more = {name: count - held[name] for name, count in settled(server).items()}
        growth = resident(server) - size
        log = server.log()
    print(
        f"\n{state.right.total()} right, {len(state.wrong)} wrong, {state.left.total()} left,"
        f" {len(state.swaps)} swaps; memory {growth / 2**20:+.1f} MiB; {more}"
    )
    assert state.wrong == []
    assert min(state.right[content] for content in state.contents.values()) > seconds, state.right
    assert min(state.left[content] for content in state.contents.values()) > 0 and len(state.swaps) > seconds / 4
    assert growth <= MAX_GROWTH_BYTES
    assert all(count <= MAX_MORE_HELD for count in more.values()), more
    assert "Traceback" not in log


@pytest.mark.slow
def test_a_wrong_adapter_would_be_found(known: tuple[list[str], dict[str, str]]) -> None:
    """The control: with the answers of two contents exchanged, all of theirs are wrong."""
    flags, texts = known
    exchanged = texts | {"one": texts["other"], "other": texts["one"]}
    with running(REAL, *flags, "--log-level", "warning") as server:
        state = asyncio.run(soak(server, exchanged, 2))
    assert state.wrong and state.right.keys() == {state.contents["fixed"]}


@pytest.mark.slow
def test_an_old_version_would_be_found(
    known: tuple[list[str], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: an operator that only says that it replaces the adapter."""
    flags, texts = known

    async def swap(state: Soak, path: str) -> None:
        state.swaps.append(state.contents[path])
        state.num_sure = len(state.swaps)

    monkeypatch.setattr(Soak, "swap", swap)
    with running(REAL, *flags, "--log-level", "warning") as server:
        state = asyncio.run(soak(server, texts, 2))
    assert {name for name, *_ in state.wrong} == {"swapped"}
