"""The real scheduler between clients, under a clock that its steps move: what each gets can be compared."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from stellarbyte_server.engine.state.account import Account
from stellarbyte_server.engine.state.sequence import Sequence
from tests.support.engines.engine import is_complete, make_request, make_scheduler

ANSWER = 40  # tokens of an ordinary answer
PROMPT = 20


@dataclass
class Client:
    """Asks one question after the other, as a chat does; notes waiting times and tokens."""

    account: Account
    first_tokens_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    current: Sequence | None = None


@dataclass(frozen=True)
class Device:
    base_s: float
    token_s: float
    limits: dict[str, int | None]


CPU_LIMITS: dict[str, int | None] = {
    "max_num_batched_tokens": 128,
    "max_prefill_tokens": 32,
    "free_tokens": 3,
    "most_credit": 256,
}
CPU = Device(0.025, 0.0075, CPU_LIMITS)
GPU = Device(0.0007, 0.00002, {"max_num_batched_tokens": 8192, "free_tokens": 32, "most_credit": 1024})


class World:
    """Clients, an attacker, and the scheduler between them."""

    def __init__(
        self, device: Device, attack: Callable[["World"], None] | None = None, num_clients: int = 3, **options: Any
    ) -> None:
        self.now_s = 0.0
        self.device = device
        self.scheduler = make_scheduler(
            **({"num_blocks": 4096, "block_size": 16, "max_num_seqs": 32} | device.limits | options),
            clock=lambda: self.now_s,
        )
        self.clients = [Client(Account(f"client-{number}")) for number in range(num_clients)]
        self.attacker = Account("attacker")
        self.attack = attack
        self.num_asked = 0
        self.step_tokens: list[int] = []
        self.num_tokens_of_attacker = 0

    def ask(self, account: Account, num_prompt: int, max_tokens: int, **fields: Any) -> Sequence:
        self.num_asked += 1
        request = make_request(
            [self.num_asked % 1000] * num_prompt, max_tokens, str(self.num_asked), cache_salt=account.name, **fields
        )
        return self.scheduler.add(request, account=account)

    def run(self, seconds: float) -> "World":
        while self.now_s < seconds:
            if self.attack is not None:
                self.attack(self)
            for client in self.clients:
                if client.current is None:
                    client.current = self.ask(client.account, PROMPT, ANSWER)
            self.step()
        return self

    def step(self) -> None:
        chunks = self.scheduler.schedule()
        self.scheduler.take_displaced()
        num_tokens = sum(chunk.length for chunk in chunks)
        self.step_tokens.append(num_tokens)
        self.now_s += self.device.base_s + self.device.token_s * num_tokens
        self.num_tokens_of_attacker += sum(c.length for c in chunks if c.sequence.account is self.attacker)
        for sequence, _ in self.scheduler.apply(chunks, [[1] * chunk.samples for chunk in chunks]):
            client = next((c for c in self.clients if c.current is sequence), None)
            if client is not None:
                client.num_tokens += 1
                if sequence.num_generated == 1:
                    client.first_tokens_s.append(self.now_s - sequence.arrived_s)
            if sequence.account.bucket is not None:
                sequence.account.bucket.take(1, self.now_s)
            if is_complete(sequence):
                self.scheduler.remove(sequence)
                if client is not None:
                    client.current = None

    @property
    def rate(self) -> float:
        """Tokens of answers a second of the client that gets the fewest."""
        return min(client.num_tokens for client in self.clients) / self.now_s

    @property
    def first_token_s(self) -> float:
        """What 19 of 20 answers of any client begin within."""
        return max(sorted(client.first_tokens_s)[len(client.first_tokens_s) * 19 // 20] for client in self.clients)


DEVICES = [pytest.param(CPU, 60.0, id="cpu"), pytest.param(GPU, 3.0, id="gpu")]
