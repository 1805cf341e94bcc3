"""Metrics of the tiers below the device's KV cache, under the names of vLLM's connectors where they have them."""

from stellarbyte_server.protocol.offload_stats import OffloadStats


def offload_counts(stats: OffloadStats) -> tuple[tuple[str, str, int], ...]:
    """Counters without a label: name, help, value."""
    return (
        (
            "vllm:external_prefix_cache_queries",
            "Tokens of prompts looked up in host memory and on disk.",
            stats.queried_tokens,
        ),
        (
            "vllm:external_prefix_cache_hits",
            "Tokens of prompts found in host memory or on disk.",
            stats.found_tokens,
        ),
        (
            "stellarbyte:kv_offload_dropped_blocks",
            "Blocks of the KV cache that were not copied to host memory.",
            stats.dropped_blocks,
        ),
    )


def offload_by_tier(stats: OffloadStats) -> tuple[tuple[str, str, str, dict[str, int]], ...]:
    """Counters by tier: name, help, label, values."""
    return (
        (
            "vllm:kv_offload_store_bytes",
            "Bytes of blocks of the KV cache copied to a tier.",
            "tier",
            {"memory": stats.memory_stored_bytes, "disk": stats.disk_stored_bytes},
        ),
        (
            "vllm:kv_offload_load_bytes",
            "Bytes of blocks of the KV cache loaded from a tier.",
            "tier",
            {"memory": stats.memory_loaded_bytes, "disk": stats.disk_loaded_bytes},
        ),
        (
            "stellarbyte:kv_offload_stored_blocks",
            "Blocks of the KV cache copied to a tier.",
            "tier",
            {"memory": stats.memory_stored_blocks, "disk": stats.disk_stored_blocks},
        ),
        (
            "stellarbyte:kv_offload_loaded_blocks",
            "Blocks of the KV cache found in a tier and loaded.",
            "tier",
            {"memory": stats.memory_loaded_blocks, "disk": stats.disk_loaded_blocks},
        ),
    )
