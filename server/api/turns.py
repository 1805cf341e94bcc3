"""Few at once, and in turns: how work that many keys ask for is begun. Knows nothing of the work."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Lets `at_once` works run on one event loop; of those that wait, each key has one begun in turn."""

    def __init__(self, at_once: int) -> None:
        self._num_free = at_once
        self._waiting: dict[str | None, deque[asyncio.Future[None]]] = {}  # the key that is next comes first

    @asynccontextmanager
    async def turn(self, key: str | None) -> AsyncIterator[None]:
        """Wait for a turn and have it while the block runs."""
        if self._num_free:
            self._num_free -= 1
        else:
            await self._wait(key)
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, key: str | None) -> None:
        mine = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if not mine.cancelled():  # it had just come
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            key = next(iter(self._waiting))
            of_key = self._waiting.pop(key)
            while of_key and of_key[0].done():  # cancelled
                of_key.popleft()
            if not of_key:
                continue
            of_key.popleft().set_result(None)
            if of_key:
                self._waiting[key] = of_key  # behind all others
            return
        self._num_free += 1
