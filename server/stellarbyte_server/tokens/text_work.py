"""Work on texts outside the event loop, in few threads that owners share fairly.

Short texts have separate threads, so that they never wait for long ones. Among waiting texts, those go first whose
owner has had the fewest characters processed since it began to wait. Event loop thread only.
"""

import asyncio
import contextlib
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from stellarbyte_server.give_way import give_way

SHORT_CHARACTERS = 2**14
# Delay of an owner's next large body, as a multiple of its last one's time: so an owner takes at most a fifth of a
# core. Bodies are parsed at the event loop's priority, since parsing holds the GIL.
BODY_REST = 4.0
LONG_REST = 1.0  # the same for long texts: half a thread for each owner, as tokenizing shares cores with the model
MAX_WAITING_CHARACTERS = 2**25  # of one owner's short texts, or long ones
_LEAST_CHARACTERS = 2**10  # a text counts for at least these
T = TypeVar("T")


class TooMuchText(Exception):
    """Too much work of an owner is waiting; str() is one sentence for the user."""


class TextWork:
    """Thread pools, with threads started on demand."""

    def __init__(self, max_waiting_characters: int = MAX_WAITING_CHARACTERS) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._short = _Lane(max(2, cores // 4), max_waiting_characters)
        self._long = _Lane(max(1, cores // 4), max_waiting_characters, rest=LONG_REST)
        self._bodies = _Lane(1, max_waiting_characters, rest=BODY_REST, is_nice=False)
        self._grammars = _Lane(2, max_waiting_characters)

    async def run(self, work: Callable[[], T], owner: str, num_characters: int) -> T:
        """Run `work` in a thread and return its result; TooMuchText. Work of a caller cancelled before the start is not
        done."""
        lane = self._short if num_characters <= SHORT_CHARACTERS else self._long
        return await lane.run(work, owner, max(_LEAST_CHARACTERS, num_characters))

    async def parse(self, work: Callable[[], T], owner: str, num_bytes: int) -> T:
        """As `run`, for a request's body, one at a time."""
        return await self._bodies.run(work, owner, num_bytes)

    async def check(self, work: Callable[[], T], owner: str, num_characters: int) -> T:
        """As `run`, for a grammar, which may take minutes and cannot be interrupted."""
        return await self._grammars.run(work, owner, num_characters)


class _Lane:
    def __init__(
        self, num_threads: int, max_waiting_characters: int, *, rest: float = 0.0, is_nice: bool = True
    ) -> None:
        self._rest = rest
        self._threads = ThreadPoolExecutor(num_threads, "texts", initializer=give_way if is_nice else None)
        self._num_threads = self._num_free = num_threads
        self._max_waiting_characters = max_waiting_characters
        self._most_of_one = max(1, num_threads - 1)  # threads of one owner at once; one is left for others
        self._num_running: Counter[str] = Counter()  # threads of each owner
        self._waiting: dict[str, deque[tuple[asyncio.Future[None], int]]] = {}  # by owner: futures and their characters
        self._num_waiting: dict[str, int] = {}  # characters
        self._had: dict[str, int] = {}  # characters processed, of owners that recently had or want a thread
        self._least = 0  # characters of the owner that got the last thread; new owners start with as many

    async def run(self, work: Callable[[], T], owner: str, num_characters: int) -> T:
        await self._turn(owner, num_characters)
        loop = asyncio.get_running_loop()
        begun_s = 0.0

        def timed() -> T:
            nonlocal begun_s
            begun_s = time.monotonic()
            return work()

        def free(_: "Future[T]") -> None:
            rest_s = self._rest * (time.monotonic() - begun_s)
            with contextlib.suppress(RuntimeError):  # the loop is closed at shutdown
                loop.call_soon_threadsafe(self._free, owner, rest_s)

        working = self._threads.submit(timed)
        working.add_done_callback(free)  # not on the caller's cancellation: the thread continues
        return await asyncio.wrap_future(working)

    async def _turn(self, owner: str, num_characters: int) -> None:
        """Take a thread, or wait for one."""
        if owner not in self._waiting:
            self._had[owner] = max(self._had.get(owner, 0), self._least)
        if self._num_free and self._num_running[owner] < self._most_of_one:
            self._num_free -= 1
            self._num_running[owner] += 1
            self._had[owner] += num_characters
            return
        if self._num_waiting.get(owner, 0) + num_characters > self._max_waiting_characters:
            raise TooMuchText("Too much text of this client is already waiting; try again later.")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append((turn, num_characters))
        self._num_waiting[owner] = self._num_waiting.get(owner, 0) + num_characters
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was just granted
                self._free(owner, 0.0)
            raise

    def _free(self, owner: str, rest_s: float) -> None:
        """Release an owner's thread; it counts as the owner's for another `rest_s`."""
        self._num_free += 1
        if rest_s:
            asyncio.get_running_loop().call_later(rest_s, self._rested, owner)
            self._hand_out()
        else:
            self._rested(owner)

    def _rested(self, owner: str) -> None:
        self._num_running[owner] -= 1
        self._hand_out()

    def _hand_out(self) -> None:
        """Assign free threads to the next waiting owners."""
        while self._num_free:
            ready = [each for each in self._waiting if self._num_running[each] < self._most_of_one]
            if not ready:
                break
            following = min(ready, key=self._had.__getitem__)
            turn, num_characters = self._waiting[following].popleft()
            self._num_waiting[following] -= num_characters
            if not self._waiting[following]:
                del self._waiting[following], self._num_waiting[following]
            if not turn.cancelled():
                self._num_free -= 1
                self._num_running[following] += 1
                self._least = self._had[following]
                self._had[following] += num_characters
                turn.set_result(None)
        if self._num_free == self._num_threads and not +self._num_running:
            self._had.clear()
            self._num_running.clear()
            self._least = 0
