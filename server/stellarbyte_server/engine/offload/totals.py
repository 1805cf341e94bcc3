"""What the tiers below the pool report."""

from dataclasses import dataclass

from stellarbyte_server.engine.schedule.loading import Loading
from stellarbyte_server.protocol.offload_stats import OffloadStats


@dataclass(kw_only=True)
class OffloadTotals:
    """Counts since the engine's start, each kept by one thread. Memory or disk is where a block was found, or copied
    to."""

    num_memory_loads: int = 0
    num_disk_loads: int = 0
    num_memory_stores: int = 0
    num_disk_stores: int = 0
    num_dropped: int = 0  # blocks that lost their key before they were copied, or found the queue full

    def stats(self, block_bytes: int, loading: Loading) -> OffloadStats:
        return OffloadStats(
            queried_tokens=loading.num_queried_tokens,
            found_tokens=loading.num_loaded_tokens,
            memory_stored_blocks=self.num_memory_stores,
            disk_stored_blocks=self.num_disk_stores,
            memory_loaded_blocks=self.num_memory_loads,
            disk_loaded_blocks=self.num_disk_loads,
            memory_stored_bytes=self.num_memory_stores * block_bytes,
            disk_stored_bytes=self.num_disk_stores * block_bytes,
            memory_loaded_bytes=self.num_memory_loads * block_bytes,
            disk_loaded_bytes=self.num_disk_loads * block_bytes,
            dropped_blocks=self.num_dropped,
        )
