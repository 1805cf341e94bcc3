"""Three ordinary clients and one greedy client, compared with equal shares.

    python -m benchmarks.fairness                each attack on a server of its own, the demo model

The reference is measured just before the attack, while the fourth key chats like the others, as the machine's speed
drifts. A first token that is missing at the end counts with its delay so far.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.fairness.attacks import ATTACKS, Attack
from benchmarks.support.record import write_result
from stellarbyte.checkpoint.demo import DEMO_NAME
from tests.support.servers.server_process import REAL, ServerProcess, running

ORDINARY = ("alice", "bob", "carol")
ATTACKER = "mallory"
HEAD_START_S = 2.0  # of the attacker
SECONDS = 8.0
QUESTIONS = ["What is the capital of France?", "Tell me about the sea.", "How do plants grow?"]


@dataclass
class Client:
    key: str
    first_tokens_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    failures: list[str] = field(default_factory=list)
    asked_s: float | None = None  # start of a request without a first token

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
    first_token_s: float  # 90th percentile
    tokens_per_s: float  # of the client that gets the fewest
    growth_mib: float  # of the server's memory
    failures: list[str]  # of ordinary clients

    def __str__(self) -> str:
        return f"first token {self.first_token_s * 1000:.0f} ms, {self.tokens_per_s:.1f} tokens/s"


def write_keys(folder: Path) -> str:
    """A file of keys for all four."""
    file = folder / "keys.toml"
    file.write_text("".join(f"[{name}]\nkey = 'key-{name}'\n" for name in (*ORDINARY, ATTACKER)))
    file.chmod(0o600)
    return str(file)


async def measure(server: ServerProcess, attack: Attack | None, seconds: float = SECONDS) -> Figures:
    """Figures of the ordinary clients; without an attack the fourth key chats, too."""
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
    return Figures(
        first_token_s=sorted(waits)[len(waits) * 9 // 10],
        tokens_per_s=min(client.num_tokens for client in clients) / seconds,
        growth_mib=growth_mib,
        failures=[failure for client in clients for failure in client.failures],
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="how long each load lasts (default: %(default)g)"
    )
    seconds = parser.parse_args().seconds
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        keys = write_keys(Path(folder))
        for attack in ATTACKS:
            with running(REAL, "--keys", keys) as server:
                asyncio.run(measure(server, None, 3.0))  # warm-up
                equal = asyncio.run(measure(server, None, seconds))
                attacked = asyncio.run(measure(server, attack, seconds))
            print(f"{attack.__name__}: {attacked} (equal shares: {equal}); {len(attacked.failures)} streams failed")
            figures[attack.__name__] = {
                "equal_shares": _rounded(equal),
                "attacked": _rounded(attacked),
                "share_of_rate": round(attacked.tokens_per_s / equal.tokens_per_s, 3),
                "times_first_token": round(attacked.first_token_s / equal.first_token_s, 3),
            }
    write_result("fairness", figures)


def _rounded(figures: Figures) -> dict[str, object]:
    values = dataclasses.asdict(figures)
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}


if __name__ == "__main__":
    main()
