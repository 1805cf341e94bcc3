"""Changes of the cache as events in vLLM's msgpack form (vllm/distributed/kv_events.py).

A batch is an array [time, events, rank of the engine]; an event is a map with its `type`. Hashes are the last 64 bits
of the keys.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from stellarbyte_server.engine.state.cache_log import BlockOrigin, StoredBlock


class BlockStored(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=True):
    """Blocks that follow each other, of equal size."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None  # vLLM's former name of the adapter, always null
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None]  # for each block, what its hash depends on besides tokens and parent
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class BlockRemoved(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=True):
    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, tag_field="type"):
    """The cache is empty: the engine has started."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, frozen=True, array_like=True):
    ts: float  # Unix seconds
    events: list[Event]
    data_parallel_rank: int


@dataclass(frozen=True, kw_only=True)
class CacheKind:
    """The cache that the events are of. `window`: of the widest layer; None: some layer sees the whole context."""

    medium: str  # GPU or CPU
    window: int | None

    @property
    def _of_stored(self) -> dict[str, Any]:
        if self.window is None:
            return {"kv_cache_spec_kind": "full_attention"}
        return {"kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": self.window}

    def events(self, changes: Iterable[StoredBlock | bytes]) -> list[Event]:
        """The events of changes, in order: successive blocks of one sequence together, and successive removals."""
        groups: list[list[StoredBlock | bytes]] = []
        for change in changes:
            if groups and _continues(groups[-1][-1], change):
                groups[-1].append(change)
            else:
                groups.append([change])
        return [self._event(group) for group in groups]

    def _event(self, group: list[StoredBlock | bytes]) -> Event:
        stored = [change for change in group if isinstance(change, StoredBlock)]
        if not stored:
            keys = [change for change in group if isinstance(change, bytes)]
            return BlockRemoved(block_hashes=[hash_of(key) for key in keys], medium=self.medium, group_idx=0)
        first = stored[0]
        return BlockStored(
            block_hashes=[hash_of(block.key) for block in stored],
            parent_block_hash=None if first.parent is None else hash_of(first.parent),
            token_ids=[token for block in stored for token in block.tokens],
            block_size=len(first.tokens),
            lora_id=None,
            medium=self.medium,
            lora_name=first.origin.adapter,
            extra_keys=[_extra_keys(block.origin, is_first=block.parent is None) for block in stored],
            group_idx=0,
            **self._of_stored,
        )


def hash_of(key: bytes) -> int:
    """A block's hash in events: the last 64 bits of its key, as vLLM's integers."""
    return int.from_bytes(key[-8:], "big")


def _continues(last: StoredBlock | bytes, change: StoredBlock | bytes) -> bool:
    """Whether a change belongs to the event of the one before it."""
    if isinstance(last, bytes) or isinstance(change, bytes):
        return isinstance(last, bytes) and isinstance(change, bytes)
    is_equal = len(last.tokens) == len(change.tokens) and last.origin == change.origin
    return is_equal and change.parent == last.key


def _extra_keys(origin: BlockOrigin, *, is_first: bool) -> tuple[Any, ...] | None:
    """vLLM's extra keys: the adapter's name in every block that it changes; in a sequence's first block also all else
    that its hash covers, and in every block that an activated adapter changes."""
    keys: tuple[Any, ...] = () if origin.adapter is None else (origin.adapter,)
    if origin.adapter is not None and (is_first or origin.adapter_start is not None):
        keys += (origin.adapter_hash, origin.adapter_scale)
    if origin.adapter_start is not None:
        keys += (origin.adapter_start,)
    if is_first and origin.salt:
        keys += (origin.salt,)
    return keys or None
