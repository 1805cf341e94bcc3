"""Engines with tiers below their pool of blocks, whose steps follow what the tiers' threads have done."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.config import ByteModelConfig
from stellarbyte_server.engine.offload.block_file import HEADER_BYTES
from stellarbyte_server.engine.offload.block_folder import BlockFolder
from stellarbyte_server.engine.offload.copies import HostCopies
from stellarbyte_server.engine.offload.offload import Offload
from stellarbyte_server.engine.schedule.scheduler import Scheduler
from stellarbyte_server.engine.state.block_pool import CacheLayout
from stellarbyte_server.engine.state.sequence import Chunk, Sequence
from tests.support.engines.engine import generated, is_complete, make_request, make_scheduler
from tests.support.engines.symbolic_cache import continuation
from tests.support.tools.readable import readable

Compute = Callable[[list[Chunk]], list[list[int]]]
IDENTITY = b"i" * 32
NAMES = ByteModelConfig(
    vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, head_dim=2, intermediate_size=4
)
"""Of a cache whose keys have room for one 64-bit name at each position, and whose values for another."""


def make_cache(config: ByteModelConfig, num_blocks: int, block_size: int) -> PagedKVCache:
    """Whatever is read before it was written is NaN."""
    cache = PagedKVCache(config, num_blocks, block_size, torch.float32, torch.device("cpu"))
    cache.keys_LBSKD.fill_(float("nan"))
    cache.values_LBSKD.fill_(float("nan"))
    return cache


def make_offload(
    cache: PagedKVCache, num_slots: int = 1000, folder: Path | None = None, num_files: int = 1000,
    identity: bytes = IDENTITY,
) -> Offload:  # fmt: skip
    copies = HostCopies(cache)
    files = None
    if folder is not None:
        files = BlockFolder(folder, num_files * (copies.num_bytes + HEADER_BYTES), identity, copies.num_bytes)
    offload = Offload(copies, num_slots, files)
    offload.start()
    return offload


class CachedNames:
    """The slots of a `SymbolicRunner` in a cache's tensors: (block, offset) → name, once as a key, once as a value."""

    def __init__(self, cache: PagedKVCache) -> None:
        self._keys_BS = cache.keys_LBSKD[0].view(torch.int64)[..., 0, 0].numpy()
        self._values_BS = cache.values_LBSKD[0].view(torch.int64)[..., 0, 0].numpy()

    def __setitem__(self, slot: tuple[int, int], name: int) -> None:
        self._keys_BS[slot], self._values_BS[slot] = name, ~name

    def __getitem__(self, slot: tuple[int, int]) -> int:
        assert self._values_BS[slot] == ~self._keys_BS[slot]
        return int(self._keys_BS[slot])


class OffloadEngine:
    """A scheduler with tiers, and what computes its chunks: it returns the tokens of each."""

    def __init__(self, offload: Offload, make_compute: Callable[[CacheLayout], Compute], **options: Any) -> None:
        self.offload = offload
        self.scheduler: Scheduler = make_scheduler(tiers=offload, **options)
        self.compute = make_compute(self.scheduler.layout)

    @property
    def num_loads(self) -> int:
        """Blocks loaded so far."""
        return self.offload.totals.num_memory_loads + self.offload.totals.num_disk_loads

    def settle(self) -> None:
        self.offload.settle()
        self.scheduler.settle_loads()

    def step(self) -> list[Chunk]:
        """A step; without anything to compute it waits for the tiers."""
        self.settle()
        chunks = self.scheduler.schedule()
        if not chunks and self.scheduler.has_work:
            assert readable([self.offload.wake_up.fd], 10), "nothing runs and nothing comes"
            return chunks
        for sequence, _ in self.scheduler.apply(chunks, self.compute(chunks)):
            if is_complete(sequence):
                self.scheduler.remove(sequence)
        return chunks

    def run(self) -> None:
        while self.scheduler.has_work:
            self.step()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Meanwhile the thread that copies is not told of any work; it must have none."""
        with mock.patch.object(self.offload, "_set_to_work"):
            yield
        self.offload._set_to_work()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """While the tiers' threads work."""
        deadline_s = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline_s
            self.settle()
            time.sleep(0.001)

    def wait_stored(self) -> None:
        """Until all blocks with keys have been copied, and written if there is a folder."""
        self.wait_until(lambda: not self.offload.num_uncopied)
        self.wait_until(lambda: not self.offload.num_unwritten)

    def forget_pool(self) -> None:
        """Evict all blocks from the pool: others take them and give them back."""
        pool = self.scheduler.pool
        assert not pool.num_used
        blocks = pool.take(pool.num_blocks)
        assert blocks is not None
        pool.give_back(blocks)

    def close(self) -> None:
        self.offload.close()


Engines = Callable[..., OffloadEngine]
"""Makes engines of names, which are closed at the end of the test."""


def run_one(engine: OffloadEngine, tokens: list[int], max_tokens: int = 3, **fields: Any) -> Sequence:
    """A finished request, with the tokens that it must get."""
    request = make_request(tokens, max_tokens, **fields)
    sequence = engine.scheduler.add(request)
    engine.run()
    assert generated(sequence) == continuation(request)
    return sequence
