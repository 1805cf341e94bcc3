"""Fills the blocks of loads from host memory and files, in order, without waiting for a file."""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stellarbyte_server.engine.offload.block_folder import BlockFolder
from stellarbyte_server.engine.offload.copies import BlockCopies
from stellarbyte_server.engine.offload.folder_reader import FolderReader
from stellarbyte_server.engine.offload.host_blocks import HostBlocks, host_memory
from stellarbyte_server.engine.offload.totals import OffloadTotals
from stellarbyte_server.engine.state.lower_tiers import BlockLoad, LoadedBlock

logger = logging.getLogger("server.engine")

FILE_LIMIT_S = 3.0  # a file that takes longer hangs
LOAD_LIMIT_S = 30.0  # from a load's beginning; its other blocks are computed


@dataclass(eq=False, kw_only=True)
class _Filling:
    """A load of which some blocks are in files."""

    load: BlockLoad
    fence: object
    give_up_s: float
    begun: tuple[bytes, int] | None = None  # key and block, neither pending nor done


@dataclass(eq=False, kw_only=True)
class _Read:
    """The file that is read."""

    filling: _Filling | None  # None: given up
    slot: int | None  # of host memory; None: none was free
    content: np.ndarray
    give_up_s: float


class BlockLoads:
    """`add` and `has_file` are for any thread, all else for the one that copies.

    A load ends when its blocks are filled, or found nowhere, or too late: when a file hangs, or LOAD_LIMIT_S after it
    was added. While a file hangs, no other is read.
    """

    def __init__(
        self,
        copies: BlockCopies,
        host: HostBlocks,
        folder: BlockFolder | None,
        totals: OffloadTotals,
        set_to_work: Callable[[], None],
    ) -> None:
        """`set_to_work` wakes the thread that copies, for `advance`."""
        self._copies = copies
        self._host = host
        self._folder = folder
        self._totals = totals
        self._reader = None if folder is None else FolderReader(folder, set_to_work)
        self._scratch = host_memory(1, copies.num_bytes)[0]  # for a file when no slot is free
        copies.adopt(self._scratch)
        self._added: deque[_Filling] = deque()
        self._with_files: deque[_Filling] = deque()  # oldest first: of it the next file is read
        self._read: _Read | None = None
        self._hangs = False

    def start(self) -> None:
        if self._reader is not None:
            self._reader.start()

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close(0 if self._hangs else FILE_LIMIT_S)

    def has_file(self, key: bytes) -> bool:
        """Whether a file probably has the content of this key, and can be read now."""
        return self._folder is not None and not self._hangs and self._folder.has(key)

    def add(self, load: BlockLoad, fence: object) -> None:
        self._added.append(_Filling(load=load, fence=fence, give_up_s=time.monotonic() + LOAD_LIMIT_S))

    @property
    def patience_s(self) -> float | None:
        """Seconds until `advance` gives something up; None: nothing waits for a file."""
        limits_s = [filling.give_up_s for filling in self._with_files]
        if self._read is not None and not self._hangs:
            limits_s.append(self._read.give_up_s)
        return max(0.0, min(limits_s) - time.monotonic()) if limits_s else None

    @property
    def has_work(self) -> bool:
        """Whether `advance` has something to do."""
        return bool(self._added) or (self._reader is not None and self._reader.has_ended) or self.patience_s == 0

    def advance(self) -> list[BlockLoad]:
        """Fill what can be filled without waiting for a file; returns the loads that have ended."""
        self._note_read()
        self._give_up_late()
        while self._added:
            self._with_files.append(self._added.popleft())
            self._fill(self._with_files[-1])
        ended = [filling.load for filling in self._with_files if filling.begun is None]
        self._with_files = deque(filling for filling in self._with_files if filling.begun is not None)
        if self._with_files and self._read is None:
            self._begin_read(self._with_files[0])
        return ended

    def _fill(self, filling: _Filling) -> None:
        """Fill the next blocks, as far as the engine thread leaves them, up to one whose file must be read."""
        while True:
            try:
                key, block = filling.load.pending.popleft()
            except IndexError:  # none is left
                return
            if (slot := self._host.pin(key)) is not None:
                is_filled = self._write(self._host.memory[slot], block, filling.fence)
                self._host.unpin(slot)
                self._totals.num_memory_loads += is_filled
            elif self.has_file(key):
                filling.begun = key, block
                return
            else:
                is_filled = False
            filling.load.done.append(LoadedBlock(key, block, is_filled))

    def _write(self, content: np.ndarray, block: int, fence: object) -> bool:
        try:
            self._copies.write(content, block, fence)
        except Exception:  # its tokens are computed instead
            logger.exception("a block of the KV cache could not be loaded")
            return False
        return True

    def _begin_read(self, filling: _Filling) -> None:
        """Into host memory, which keeps the block, if it has a slot."""
        assert self._reader is not None and filling.begun is not None
        slot = self._host.reserve()
        content = self._scratch if slot is None else self._host.memory[slot]
        give_up_s = time.monotonic() + FILE_LIMIT_S
        self._read = _Read(filling=filling, slot=slot, content=content, give_up_s=give_up_s)
        self._reader.begin(filling.begun[0], content)

    def _note_read(self) -> None:
        """Copy the block that was read, and go on with its load."""
        if self._read is None or self._reader is None or (is_read := self._reader.take_ended()) is None:
            return
        read, self._read = self._read, None
        if self._hangs:
            self._hangs = False
            logger.info("--kv-offload-dir: files are read again")
        if read.filling is not None:
            self._take_read(read, read.filling, is_read=is_read)
        elif read.slot is not None:  # of a load that has ended: the key may have been discarded since
            self._host.give_back(read.slot)

    def _take_read(self, read: _Read, filling: _Filling, *, is_read: bool) -> None:
        assert filling.begun is not None
        (key, block), filling.begun = filling.begun, None
        is_filled = is_read and self._write(read.content, block, filling.fence)
        self._totals.num_disk_loads += is_filled
        if read.slot is not None and is_filled:
            self._host.put(key, read.slot)
        elif read.slot is not None:
            self._host.give_back(read.slot)
        filling.load.done.append(LoadedBlock(key, block, is_filled))
        self._fill(filling)

    def _give_up_late(self) -> None:
        now_s = time.monotonic()
        if self._read is not None and not self._hangs and self._read.give_up_s <= now_s:
            self._hangs = True
            logger.warning(
                "--kv-offload-dir: a file was not read within %g s; until it is, no other is read", FILE_LIMIT_S
            )
        for filling in self._with_files:
            if self._hangs or filling.give_up_s <= now_s:
                self._give_up(filling)

    def _give_up(self, filling: _Filling) -> None:
        """Leave the blocks that are not filled to be computed."""
        if self._read is not None and self._read.filling is filling:
            self._read.filling = None
        if filling.begun is not None:
            filling.load.done.append(LoadedBlock(*filling.begun, False))
            filling.begun = None
        while filling.load.pending:
            try:
                filling.load.done.append(LoadedBlock(*filling.load.pending.popleft(), False))
            except IndexError:  # the engine thread has taken the last one
                return
