"""Three ordinary clients beside one that asks for all it can: what they get, compared with equal shares.

Equal shares are what the three get while the fourth key does as they do. Shown with -s; the figures of docs/security.md
are from `scripts/test -s tests/reliability/test_fairness.py`.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from stellarbyte.checkpoint.demo import DEMO_NAME
from tests.reliability.attacks import ATTACKS, Attack
from tests.server_process import REAL, ServerProcess, running

ORDINARY = ("alice", "bob", "carol")
ATTACKER = "mallory"
HEAD_START_S = 2.0  # of the attacker
SECONDS = 8.0
QUESTIONS = ["What is the capital of France?", "Tell me about the sea.", "How do plants grow?"]
MOST_GROWTH_MIB = 600  # of all processes of the server together


@dataclass
class Client:
    key: str
    first_tokens_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    failures: list[str] = field(default_factory=list)
    asked_s: float | None = None  # when it asked what has no first token yet

    async def chat(self, url: str) -> None:
        """One question after the other."""
        headers = {"Authorization": f"Bearer key-{self.key}"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=None) as http:
            turn = 0
            while True:
                question = {"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]}
                turn += 1
                await self._ask(http, {"model": DEMO_NAME, "messages": [question], "max_tokens": 32, "stream": True})

    async def _ask(self, http: httpx.AsyncClient, body: dict) -> None:
        self.asked_s = time.monotonic()
        is_whole = False
        async with http.stream("POST", "/v1/chat/completions", json=body | {"ignore_eos": True}) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    is_whole = True
                    break
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    self.failures.append(event["error"]["message"])
                elif event["choices"][0]["delta"].get("content"):
                    self.num_tokens += 1
                    if self.asked_s is not None:
                        self.first_tokens_s.append(time.monotonic() - self.asked_s)
                        self.asked_s = None
        if not is_whole:
            self.failures.append(f"status {response.status_code}, no end")


@dataclass
class Figures:
    first_token_s: float  # nine of ten answers begin within it
    tokens_per_s: float  # of the client that gets the fewest
    growth_mib: float

    def __str__(self) -> str:
        return f"first token {self.first_token_s * 1000:.0f} ms, {self.tokens_per_s:.1f} tokens/s"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys.write_text("".join(f"[{name}]\nkey = 'key-{name}'\n" for name in (*ORDINARY, ATTACKER)))
    keys.chmod(0o600)
    with running(REAL, "--keys", str(keys), limit_s=180) as process:
        asyncio.run(measure(process, None, 3.0))  # what comes first only
        yield process


async def measure(server: ServerProcess, attack: Attack | None, seconds: float = SECONDS) -> Figures:
    """What the ordinary clients get meanwhile; without an attack the fourth key chats, too."""
    before_mib = memory_mib(server)
    clients = [Client(name) for name in ORDINARY]
    headers = {"Authorization": f"Bearer key-{ATTACKER}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=None, limits=limits) as http:
        fourth = attack(http, DEMO_NAME) if attack is not None else Client(ATTACKER).chat(server.url)
        attacking = asyncio.create_task(fourth)
        await asyncio.sleep(HEAD_START_S)
        chatting = [asyncio.create_task(client.chat(server.url)) for client in clients]
        await asyncio.wait([attacking, *chatting], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        growth_mib = memory_mib(server) - before_mib
        now_s = time.monotonic()
        for task in (attacking, *chatting):
            if task.done():
                task.result()
            task.cancel()
        await asyncio.gather(attacking, *chatting, return_exceptions=True)
    waits = [wait for client in clients for wait in client.first_tokens_s]
    waits += [now_s - client.asked_s for client in clients if client.asked_s is not None and not client.first_tokens_s]
    assert not [failure for client in clients for failure in client.failures]
    return Figures(
        first_token_s=sorted(waits)[len(waits) * 9 // 10],
        tokens_per_s=min(client.num_tokens for client in clients) / seconds,
        growth_mib=growth_mib,
    )


def memory_mib(server: ServerProcess) -> float:
    """Resident memory of the HTTP process and the engine."""
    total = 0
    for pid in (server.process.pid, server.engine_pid()):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    total += int(line.split()[1])
    return total / 1024


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_ordinary_clients_beside_an_attacker(server: ServerProcess, attack: Attack) -> None:
    equal = asyncio.run(measure(server, None))  # just before: other programs on the machine come and go
    figures = asyncio.run(measure(server, attack))
    print(f"\n{attack.__name__}: {figures} (equal shares: {equal}), memory {figures.growth_mib:+.0f} MiB")
    assert figures.tokens_per_s >= 0.5 * equal.tokens_per_s
    assert figures.first_token_s <= 3 * equal.first_token_s
    assert figures.growth_mib <= MOST_GROWTH_MIB
