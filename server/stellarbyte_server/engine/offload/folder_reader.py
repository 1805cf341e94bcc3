"""Reads the files of blocks, one at a time, in a thread of its own: a disk that hangs stops nothing else."""

import logging
import queue
import threading
from collections.abc import Callable

import numpy as np

from stellarbyte_server.engine.offload.block_folder import BlockFolder
from stellarbyte_server.give_way import give_way

logger = logging.getLogger("server.engine")


class FolderReader:
    """Methods are for one thread and never wait, but for `close`.

    Args:
        note_end: called by the reading thread when a read has ended.
    """

    def __init__(self, folder: BlockFolder, note_end: Callable[[], None]) -> None:
        self._folder = folder
        self._note_end = note_end
        self._queue: queue.SimpleQueue[tuple[bytes, np.ndarray] | None] = queue.SimpleQueue()
        self._is_filled: bool | None = None  # of the read that has ended
        self._thread = threading.Thread(target=self._run, name="kv-offload-reads", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def begin(self, key: bytes, out: np.ndarray) -> None:
        """Read a block into uint8 [N], which is the thread's until `take_ended` returns the result."""
        self._queue.put((key, out))

    @property
    def has_ended(self) -> bool:
        return self._is_filled is not None

    def take_ended(self) -> bool | None:
        """Whether the block has been read; None: not yet."""
        is_filled, self._is_filled = self._is_filled, None
        return is_filled

    def close(self, timeout_s: float) -> None:
        """End the thread; one whose read hangs ends with the process."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        give_way()
        while (task := self._queue.get()) is not None:
            try:
                is_filled = self._folder.read(*task)
            except Exception:  # its tokens are computed instead
                logger.exception("--kv-offload-dir: a block could not be read")
                is_filled = False
            self._is_filled = is_filled
            self._note_end()
