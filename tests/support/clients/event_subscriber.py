"""A subscriber to events of the KV cache, like a router's: it knows vLLM's form and nothing of the server's code."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq

LIMIT_S = 30.0


@dataclass
class KnownBlock:
    parent: int | None
    tokens: list[int]
    lora_name: str | None
    extra_keys: list[Any] | None


@dataclass
class EventSubscriber:
    """Follows one engine; a number that is missing is asked for at the replay socket."""

    events: str
    replay: str
    topic: bytes = b""
    blocks: dict[int, KnownBlock] = field(default_factory=dict)  # cached ones, by hash
    seen: list[dict[str, Any]] = field(default_factory=list)  # all events
    ranks: set[int] = field(default_factory=set)
    next_number: int = 0

    def __post_init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._subscription = self._context.socket(zmq.SUB)
        self._subscription.setsockopt(zmq.SUBSCRIBE, self.topic)
        self._subscription.connect(self.events)
        self._replay = self._context.socket(zmq.DEALER)
        self._replay.connect(self.replay)

    def close(self) -> None:
        self._context.destroy(linger=0)

    def follow(self, num_batches: int) -> None:
        """Until all batches before this number were seen, live or replayed."""
        deadline_s = time.monotonic() + LIMIT_S
        while self.next_number < num_batches:
            assert time.monotonic() < deadline_s, f"batch {self.next_number} did not come"
            if self._subscription.poll(100):
                topic, frame, payload = self._subscription.recv_multipart()
                assert topic == self.topic
                if int.from_bytes(frame, "big") == self.next_number:
                    self._note(payload)
                    continue
            for number, payload in self.ask_again(self.next_number):
                if number == self.next_number:
                    self._note(payload)

    def ask_again(self, start: int) -> Iterator[tuple[int, bytes]]:
        """What the replay socket has from a number on."""
        self._replay.send_multipart((b"", start.to_bytes(8, "big")))
        while self._replay.poll(int(LIMIT_S * 1000)):
            _, number, payload = self._replay.recv_multipart()
            if not payload:
                assert int.from_bytes(number, "big", signed=True) == -1
                return
            yield int.from_bytes(number, "big"), payload
        raise AssertionError("the replay did not end")

    def _note(self, payload: bytes) -> None:
        _, events, rank = msgspec.msgpack.decode(payload)
        self.next_number += 1
        self.ranks.add(rank)
        for event in events:
            self.seen.append(event)
            if event["type"] == "AllBlocksCleared":
                self.blocks.clear()
            elif event["type"] == "BlockRemoved":
                for block in event["block_hashes"]:
                    del self.blocks[block]
            else:
                self._store(event)

    def _store(self, event: dict[str, Any]) -> None:
        assert event["type"] == "BlockStored" and event["lora_id"] is None
        parent, size = event["parent_block_hash"], event["block_size"]
        assert len(event["token_ids"]) == size * len(event["block_hashes"])
        for number, block in enumerate(event["block_hashes"]):
            assert block not in self.blocks, "stored twice"
            tokens = event["token_ids"][number * size : (number + 1) * size]
            self.blocks[block] = KnownBlock(parent, tokens, event["lora_name"], event["extra_keys"][number])
            parent = block

    def cached_tokens(self, tokens: list[int], lora_name: str | None, first_keys: list[Any] | None) -> int:
        """How many of a prompt's first tokens the engine has, by the events alone, if it never forgets a middle."""
        found, parent, first = 0, None, True
        while True:
            block = next(
                (
                    (key, known)
                    for key, known in self.blocks.items()
                    if known.parent == parent
                    and known.lora_name == lora_name
                    and known.tokens == tokens[found : found + len(known.tokens)]
                    and (not first or known.extra_keys == first_keys)
                ),
                None,
            )
            if block is None:
                return found
            parent, first = block[0], False
            found += len(block[1].tokens)
