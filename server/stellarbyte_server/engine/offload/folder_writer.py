"""Writes, touches and removes the files of blocks, in order, from a thread."""

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from stellarbyte_server.engine.offload.block_folder import BlockFolder
from stellarbyte_server.engine.offload.host_blocks import HostBlocks
from stellarbyte_server.engine.offload.totals import OffloadTotals
from stellarbyte_server.give_way import give_way

logger = logging.getLogger("server.engine")

_REFRESH_S = 5.0  # between two looks for other engines' files


MAX_QUEUED_TASKS = 10_000  # beyond, uses of blocks are not noted


@dataclass(frozen=True)
class _Write:
    key: bytes
    slot: int  # pinned


@dataclass(frozen=True)
class _Remove:
    key: bytes


@dataclass(frozen=True)
class _Touch:
    keys: Sequence[bytes]


class FolderWriter:
    """Methods are for the engine thread and never wait.

    Each write holds a slot, so they are not more than slots; blocks are removed however many.
    """

    def __init__(self, folder: BlockFolder, host: HostBlocks, totals: OffloadTotals) -> None:
        self._totals = totals
        self._num_done = self._num_given = 0
        self._folder = folder
        self._host = host
        self._queue: queue.SimpleQueue[_Write | _Remove | _Touch | None] = queue.SimpleQueue()
        self._writes = True
        self._refreshed_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="kv-offload-files", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def num_queued(self) -> int:
        """Tasks that are not done."""
        return self._num_given - self._num_done

    def write(self, key: bytes, slot: int) -> None:
        """Write the block in a pinned slot, and unpin it."""
        self._give(_Write(key, slot))

    def remove(self, key: bytes) -> None:
        """Remove a block, and what is queued before of it; from now on the folder does not have it."""
        self._folder.forget(key)
        self._give(_Remove(key))

    def touch(self, keys: Sequence[bytes]) -> None:
        """Note the use of blocks, unless the disk does not keep up."""
        if self.num_queued < MAX_QUEUED_TASKS:
            self._give(_Touch(keys))

    def _give(self, task: _Write | _Remove | _Touch) -> None:
        self._num_given += 1
        self._queue.put(task)

    def close(self) -> None:
        """End the thread after all that is queued, and close the folder."""
        self._queue.put(None)
        self._thread.join()
        self._folder.close()

    def _run(self) -> None:
        give_way()
        while True:
            try:
                task = self._queue.get(timeout=_REFRESH_S)
                if task is None:
                    return
                self._do(task)
                self._num_done += 1
            except queue.Empty:
                pass
            except Exception:  # steps go on without the files
                self._num_done += 1
                logger.exception("--kv-offload-dir: a task failed")
            self._refresh()

    def _do(self, task: _Write | _Remove | _Touch) -> None:
        if isinstance(task, _Remove):
            self._folder.remove(task.key)
        elif isinstance(task, _Touch):
            for key in task.keys:
                self._folder.touch(key)
        else:
            try:
                if self._writes:
                    self._totals.num_disk_stores += self._folder.write(task.key, self._host.memory[task.slot])
            except OSError as error:
                self._writes = False
                logger.warning("--kv-offload-dir: writes no more blocks, since one failed: %s", error.strerror)
            finally:
                self._host.unpin(task.slot)

    def _refresh(self) -> None:
        now_s = time.monotonic()
        if now_s - self._refreshed_s >= _REFRESH_S:
            self._refreshed_s = now_s
            try:
                self._folder.refresh()
            except OSError as error:
                logger.warning("--kv-offload-dir: cannot be listed: %s", error.strerror)
