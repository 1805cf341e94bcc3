"""Computes masks of grammars: quick ones on the engine's thread, slow ones on others."""

import concurrent.futures
import os
from collections.abc import Callable

from stellarbyte_server.give_way import give_way

QUICK_MASK_S = 0.0005  # largest expected time of a mask on the engine's thread
QUICK_MASKS_S = 0.002  # the same for all masks of a step
QUICK_SHARE, QUICK_SHARE_OF_ALL = 0.02, 0.05  # of a step's time: a long one may have longer masks
MAX_THREADS = 4


class MaskWorkers:
    """Threads for slow masks, and the engine thread's time budget for quick ones. Engine thread only."""

    def __init__(self, on_done: Callable[[], None]) -> None:
        """`on_done` is called on another thread when a mask is complete."""
        num_threads = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // 2))
        self._threads = concurrent.futures.ThreadPoolExecutor(num_threads, "grammar-mask", initializer=give_way)
        self._on_done = on_done
        self.begin_step(0.0)

    def begin_step(self, step_s: float) -> None:
        """`step_s`: expected duration of the step; 0: unknown."""
        self._quick_s = max(QUICK_MASK_S, QUICK_SHARE * step_s)
        self._left_s = max(QUICK_MASKS_S, QUICK_SHARE_OF_ALL * step_s)

    def is_slow(self, expected_s: float) -> bool:
        """Whether a mask takes too long for the engine's thread, even if it is a step's only one."""
        return expected_s > self._quick_s

    def may_leave(self, expected_s: float) -> bool:
        """Whether the engine's thread has time for a mask in the next step, beside those before it."""
        if self.is_slow(expected_s) or expected_s > self._left_s:
            return False
        self._left_s -= expected_s
        return True

    def submit(self, compute: Callable[[], None]) -> "concurrent.futures.Future[None]":
        future = self._threads.submit(compute)
        future.add_done_callback(lambda _: self._on_done())
        return future

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
