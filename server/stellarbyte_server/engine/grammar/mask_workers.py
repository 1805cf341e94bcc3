"""Computes masks of grammars: quick ones on the engine's thread, slow ones on others."""

import concurrent.futures
import os
from collections.abc import Callable

from stellarbyte_server.give_way import give_way

QUICK_MASK_S = 0.0005  # largest expected time of a mask on the engine's thread
QUICK_MASKS_S = 0.002  # the same for all masks of a step
MAX_THREADS = 4


class MaskWorkers:
    """Threads for slow masks, and the engine thread's time budget for quick ones. Engine thread only."""

    def __init__(self, on_done: Callable[[], None]) -> None:
        """`on_done` is called on another thread when a mask is complete."""
        num_threads = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // 2))
        self._threads = concurrent.futures.ThreadPoolExecutor(num_threads, "grammar-mask", initializer=give_way)
        self._on_done = on_done
        self._left_s = QUICK_MASKS_S

    def begin_step(self) -> None:
        self._left_s = QUICK_MASKS_S

    def may_leave(self, expected_s: float) -> bool:
        """Whether the engine's thread has time for a mask in the next step."""
        if expected_s > min(QUICK_MASK_S, self._left_s):
            return False
        self._left_s -= expected_s
        return True

    def submit(self, compute: Callable[[], None]) -> "concurrent.futures.Future[None]":
        future = self._threads.submit(compute)
        future.add_done_callback(lambda _: self._on_done())
        return future

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
