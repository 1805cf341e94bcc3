"""Work on texts beside the event loop: in few threads, of which every caller gets its share.

Short texts have threads of their own, so they wait for no long one, whoever sent it. Among texts that wait for a thread
those go first whose owner has had the least, counted in characters, since it began to wait. Event loop thread only.
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
# How long an owner's next large body waits, in times that its last one took: so they take a fifth of a core at most.
# They are parsed at the event loop's own priority, since it waits for them: they let no other thread run.
BODY_REST = 4.0
LONG_REST = (
    1.0  # the same for long texts, which take half a thread of each owner: tokenizing shares cores with the model
)
MAX_WAITING_CHARACTERS = 2**25  # of one owner's short texts, or long ones
_LEAST_CHARACTERS = 2**10  # that a text counts for
T = TypeVar("T")


class TooMuchText(Exception):
    """An owner has too much work waiting; str() is one sentence for the user."""


class TextWork:
    """Threads are started when there is work for them."""

    def __init__(self, max_waiting_characters: int = MAX_WAITING_CHARACTERS) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._short = _Lane(max(2, cores // 4), max_waiting_characters)
        self._long = _Lane(max(1, cores // 4), max_waiting_characters, rest=LONG_REST)
        self._bodies = _Lane(1, max_waiting_characters, rest=BODY_REST, is_nice=False)
        self._grammars = _Lane(2, max_waiting_characters)

    async def run(self, work: Callable[[], T], owner: str, num_characters: int) -> T:
        """What `work` returns or raises; TooMuchText. If the caller is cancelled before it began it is not done."""
        lane = self._short if num_characters <= SHORT_CHARACTERS else self._long
        return await lane.run(work, owner, max(_LEAST_CHARACTERS, num_characters))

    async def parse(self, work: Callable[[], T], owner: str, num_bytes: int) -> T:
        """As `run`, for the body of a request: one at a time."""
        return await self._bodies.run(work, owner, num_bytes)

    async def check(self, work: Callable[[], T], owner: str, num_characters: int) -> T:
        """As `run`, for a grammar: that may take minutes, and nothing can end it."""
        return await self._grammars.run(work, owner, num_characters)


class _Lane:
    def __init__(
        self, num_threads: int, max_waiting_characters: int, *, rest: float = 0.0, is_nice: bool = True
    ) -> None:
        self._rest = rest
        self._threads = ThreadPoolExecutor(num_threads, "texts", initializer=give_way if is_nice else None)
        self._num_threads = self._num_free = num_threads
        self._max_waiting_characters = max_waiting_characters
        self._most_of_one = max(1, num_threads - 1)  # threads that one owner has at once: others always find one
        self._num_running: Counter[str] = Counter()  # threads that each owner has
        self._waiting: dict[str, deque[tuple[asyncio.Future[None], int]]] = {}  # by owner: turns, and their characters
        self._num_waiting: dict[str, int] = {}  # characters
        self._had: dict[str, int] = {}  # characters, of those who had or want a thread lately
        self._least = 0  # that the owner had who got a thread last: who comes anew had as much

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
            with contextlib.suppress(RuntimeError):  # the loop is closed: it is all over
                loop.call_soon_threadsafe(self._free, owner, rest_s)

        working = self._threads.submit(timed)
        working.add_done_callback(free)  # not when the caller is cancelled: the thread works on
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
            raise TooMuchText("Too much text of this client is waiting to be read already; try again later.")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append((turn, num_characters))
        self._num_waiting[owner] = self._num_waiting.get(owner, 0) + num_characters
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it had just come
                self._free(owner, 0.0)
            raise

    def _free(self, owner: str, rest_s: float) -> None:
        """Take back the thread that an owner had; it counts as the owner's until it has rested."""
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
        """Threads that are free go to who comes next."""
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
