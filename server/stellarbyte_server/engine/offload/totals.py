"""What the tiers below the pool report."""

from stellarbyte_server.engine.offload.offload import Offload
from stellarbyte_server.engine.schedule.loading import Loading
from stellarbyte_server.protocol.offload_stats import OffloadStats


def offload_stats(offload: Offload | None, loading: Loading | None) -> OffloadStats:
    """Counts since the engine's start; all 0 without tiers."""
    if offload is None or loading is None:
        return OffloadStats()
    totals, block_bytes = offload.totals, offload.block_bytes
    return OffloadStats(
        queried_tokens=loading.num_queried_tokens,
        found_tokens=loading.num_loaded_tokens,
        memory_stored_blocks=totals.num_memory_stores,
        disk_stored_blocks=totals.num_disk_stores,
        memory_loaded_blocks=totals.num_memory_loads,
        disk_loaded_blocks=totals.num_disk_loads,
        memory_stored_bytes=totals.num_memory_stores * block_bytes,
        disk_stored_bytes=totals.num_disk_stores * block_bytes,
        memory_loaded_bytes=totals.num_memory_loads * block_bytes,
        disk_loaded_bytes=totals.num_disk_loads * block_bytes,
        dropped_blocks=totals.num_dropped,
    )
