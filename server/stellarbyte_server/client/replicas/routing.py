"""Which replica gets a request: a pure function of the request and of the known state of the replicas.

A replica that has not many more requests than the least loaded one is within reach. Among those within reach the
request goes to the one that holds its adapter, then to the one that has the longest prefix of its prompt, then to the
least loaded. So residency decides between replicas of similar load, and never sends a request to a busy replica while
another one idles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

MORE_REQUESTS = 2  # within reach: as many more requests than the least loaded replica,
MORE_SHARE = 8  # or its requests divided by this number, if that is more


class Tier(IntEnum):
    """The fastest memory of a replica that holds an adapter."""

    DISK = 0
    CPU = 1
    SLOT = 2  # of the device


@dataclass(frozen=True, kw_only=True)
class RequestFacts:
    """What the choice depends on, of requests that are submitted together."""

    adapters: tuple[str, ...] = ()  # names; several: a mix


@dataclass(frozen=True, kw_only=True)
class ReplicaState:
    """A replica that serves, as far as this process knows."""

    num_requests: int  # running or waiting
    max_requests: int  # in one batch
    num_waiting_tokens: int = 0  # of prompts that this process sent and that have not begun
    cached_tokens: int = 0  # of the request's prompt
    slots: frozenset[str] = frozenset()  # names of adapters in slots of the device
    memory: frozenset[str] = frozenset()  # names of adapters in CPU memory

    @property
    def is_full(self) -> bool:
        """Whether a further request has to wait."""
        return self.num_requests >= self.max_requests

    def tier(self, facts: RequestFacts) -> Tier:
        """Where the request's adapter is; of a mix, the slowest tier of its parts, unless it has a slot itself."""
        if "+".join(facts.adapters) in self.slots:
            return Tier.SLOT
        held = self.slots | self.memory
        if len(facts.adapters) == 1:
            return Tier.CPU if facts.adapters[0] in held else Tier.DISK
        return Tier.CPU if all(name in held for name in facts.adapters) else Tier.DISK


def choose(facts: RequestFacts, replicas: Sequence[ReplicaState]) -> int:
    """The index of the replica, of at least one, that gets a request.

    Among equal replicas the first one. Other equal states may be permuted: the state of the chosen one is the same.
    """
    within_reach = _within_reach(replicas)
    return max(within_reach, key=lambda index: (*_merits(facts, replicas[index]), -index))


def _within_reach(replicas: Sequence[ReplicaState]) -> list[int]:
    """Those that a request may go to: of those with room in their batch, if any, the less loaded ones."""
    with_room = [index for index, replica in enumerate(replicas) if not replica.is_full]
    considered = with_room if with_room else list(range(len(replicas)))
    fewest = min(replicas[index].num_requests for index in considered)
    most = fewest + max(MORE_REQUESTS, fewest // MORE_SHARE)
    return [index for index in considered if replicas[index].num_requests <= most]


def _merits(facts: RequestFacts, replica: ReplicaState) -> tuple[int, int, int, int]:
    tier = replica.tier(facts) if facts.adapters else Tier.DISK
    return tier, replica.cached_tokens, -replica.num_requests, -replica.num_waiting_tokens
