"""The tiers below the pool of blocks: host memory, then a folder, filled and read by three threads.

A block is copied when it gets its key. The copy runs beside steps and counts only if the block still has its key when
the engine thread learns of it: blocks with keys are never written to. So a copy holds no block, and delays no step.
"""

import logging
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from stellarbyte_server.engine.offload.block_folder import BlockFolder
from stellarbyte_server.engine.offload.block_loads import BlockLoads
from stellarbyte_server.engine.offload.copies import BlockCopies
from stellarbyte_server.engine.offload.folder_writer import FolderWriter
from stellarbyte_server.engine.offload.host_blocks import HostBlocks
from stellarbyte_server.engine.offload.totals import OffloadTotals
from stellarbyte_server.engine.schedule.loading import Loading
from stellarbyte_server.engine.state.lower_tiers import BlockLoad
from stellarbyte_server.give_way import give_way
from stellarbyte_server.protocol.offload_stats import OffloadStats
from stellarbyte_server.wake_up import WakeUp

logger = logging.getLogger("server.engine")

MAX_QUEUED_BLOCKS = 10_000  # waiting to be copied
_RETRY_S = 0.05  # between two attempts to find memory for a copy


@dataclass(eq=False, kw_only=True)
class _Store:
    """A block to copy."""

    key: bytes
    block: int
    is_lost: bool = False  # the block may have other content now


@dataclass(frozen=True)
class _Touch:
    """Keys that were used after the blocks before it in the queue got their keys."""

    keys: list[bytes]


class Offload:
    """The `LowerTiers` of an engine, whose thread calls its methods."""

    def __init__(self, copies: BlockCopies, num_slots: int, folder: BlockFolder | None = None) -> None:
        """`num_slots`: blocks in host memory, at least 1."""
        self.totals = OffloadTotals()
        self._copies = copies
        self._host = HostBlocks(num_slots, copies.num_bytes)
        copies.adopt(self._host.memory)
        self._writer = None if folder is None else FolderWriter(folder, self._host, self.totals)
        self._loads = BlockLoads(copies, self._host, folder, self.totals, self._set_to_work)
        self._tasks: deque[_Store | _Touch] = deque()
        self._store_of: dict[int, _Store] = {}  # block → its copy, until that counts
        self._done: deque[tuple[_Store | _Touch, int | None]] = deque()  # with the slot; None: nothing was copied
        self._running: set[BlockLoad] = set()
        self._ended: deque[BlockLoad] = deque()
        self._has_work = threading.Condition()
        self._is_closing = False
        self.wake_up = WakeUp()
        """Rings when `settle` or `take_ended` has something to do."""
        self._thread = threading.Thread(target=self._run, name="kv-offload", daemon=True)

    def start(self) -> None:
        self._loads.start()
        self._thread.start()
        if self._writer is not None:
            self._writer.start()

    def close(self) -> None:
        """Write what was copied, then end the threads."""
        self._is_closing = True
        self._set_to_work()
        self._thread.join()
        self._loads.close()
        self.settle()
        if self._writer is not None:
            self._writer.close()
        self.wake_up.close()

    def stats(self, loading: Loading | None) -> OffloadStats:
        """Counts since the engine's start; `loading`: the scheduler's."""
        assert loading is not None, "the scheduler's pool has these tiers"
        return self.totals.stats(self._copies.num_bytes, loading)

    @property
    def num_uncopied(self) -> int:
        """Blocks and uses of them that do not count yet."""
        return len(self._tasks) + len(self._done)

    @property
    def num_unwritten(self) -> int:
        """Changes of the folder that are still to be made."""
        return 0 if self._writer is None else self._writer.num_queued

    def has(self, key: bytes) -> bool:
        return self._host.has(key) or self._loads.has_file(key)

    def store(self, key: bytes, block: int) -> None:
        if self.has(key):
            self.touch((key,))
        elif len(self._tasks) >= MAX_QUEUED_BLOCKS:
            self.totals.num_dropped += 1
        else:
            store = self._store_of[block] = _Store(key=key, block=block)
            self._give(store)

    def lose(self, block: int) -> None:
        store = self._store_of.pop(block, None)
        if store is not None:
            store.is_lost = True
            self.totals.num_dropped += 1

    def discard(self, key: bytes) -> None:
        self._host.drop(key)
        if self._writer is not None:
            self._writer.remove(key)
        for load in self._running:
            load.discarded.add(key)

    def touch(self, keys: Iterable[bytes]) -> None:
        touch = _Touch(list(keys))
        if touch.keys and len(self._tasks) < MAX_QUEUED_BLOCKS:
            self._give(touch)

    def load(self, load: BlockLoad) -> None:
        self._running.add(load)
        self._loads.add(load, self._copies.fence())
        self._set_to_work()

    def take_ended(self) -> list[BlockLoad]:
        ended = [self._ended.popleft() for _ in range(len(self._ended))]
        for load in ended:
            for key in tuple(load.discarded):  # read again after it was discarded, perhaps by the next of these loads
                self.discard(key)
        self._running.difference_update(ended)
        return ended

    def settle(self) -> None:
        """Let finished copies count. Never waits."""
        self.wake_up.clear()
        for _ in range(len(self._done)):
            task, slot = self._done.popleft()
            if isinstance(task, _Touch):
                self._note_use(task.keys)
            else:
                self._settle_store(task, slot)

    def _settle_store(self, store: _Store, slot: int | None) -> None:
        if not store.is_lost:
            del self._store_of[store.block]
        if slot is None:
            self.totals.num_dropped += not store.is_lost
        elif store.is_lost:
            self._host.give_back(slot)
        else:
            self.totals.num_memory_stores += 1
            self._host.put(store.key, slot, pinned=self._writer is not None)
            if self._writer is not None:
                self._writer.write(store.key, slot)

    def _note_use(self, keys: list[bytes]) -> None:
        for key in keys:
            self._host.touch(key)
        if self._writer is not None:
            self._writer.touch(keys)

    def _give(self, task: _Store | _Touch) -> None:
        self._tasks.append(task)
        self._set_to_work()

    def _set_to_work(self) -> None:
        with self._has_work:
            self._has_work.notify()

    def _run(self) -> None:
        """The thread that copies: what requests wait for first."""
        give_way()
        while True:
            with self._has_work:
                while not (self._loads.has_work or self._tasks or self._is_closing):
                    self._has_work.wait(self._loads.patience_s)
            if self._is_closing:
                return
            if not self._loads.has_work:
                self._copy_next()
            elif ended := self._loads.advance():
                self._ended += ended
                self.wake_up.ring()

    def _copy_next(self) -> None:
        """Copy the block that has waited longest into a slot, if one can be had."""
        task = self._tasks[0]
        slot: int | None = None
        if isinstance(task, _Store) and not task.is_lost:
            slot = self._host.reserve()
            if slot is None:
                with self._has_work:  # the folder is slower than the steps; meanwhile the blocks stay in the pool
                    self._has_work.wait(_RETRY_S)
                return
            try:
                self._copies.read(task.block, self._host.memory[slot])
            except Exception:  # steps go on without this copy
                logger.exception("a block of the KV cache could not be copied")
                self._host.give_back(slot)
                slot = None
        self._done.append((task, slot))
        self._tasks.popleft()
        self.wake_up.ring()
