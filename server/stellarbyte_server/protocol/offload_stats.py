"""Counts of the tiers below the device's KV cache, since the engine's start."""

from collections.abc import Iterable

import msgspec


class OffloadStats(msgspec.Struct, frozen=True, kw_only=True):
    """Of --kv-offload-memory and --kv-offload-dir; all 0 without them."""

    queried_tokens: int = 0  # tokens of prompts looked up
    found_tokens: int = 0  # of these, found and loaded
    memory_stored_blocks: int = 0  # blocks copied to host memory
    disk_stored_blocks: int = 0
    memory_loaded_blocks: int = 0  # blocks found there and copied back
    disk_loaded_blocks: int = 0
    memory_stored_bytes: int = 0
    disk_stored_bytes: int = 0
    memory_loaded_bytes: int = 0
    disk_loaded_bytes: int = 0
    dropped_blocks: int = 0  # blocks that were not copied


def sum_of_offloads(stats: Iterable[OffloadStats]) -> OffloadStats:
    """Of several engines together."""
    names = OffloadStats.__struct_fields__
    all_stats = list(stats)
    return OffloadStats(**{name: sum(getattr(each, name) for each in all_stats) for name in names})
