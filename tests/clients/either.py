"""Both Python clients behind one face, so that each test is for both."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from stellarbyte_client.async_client import AsyncAdapters

Connect = Callable[..., Any]  # the arguments of StellarByte; its methods


class Blocking:
    """Calls an asynchronous object as if it were a synchronous one."""

    def __init__(self, target: object, runner: asyncio.Runner) -> None:
        self._target = target
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if isinstance(value, AsyncAdapters):
            return Blocking(value, self._runner)
        if inspect.iscoroutinefunction(value):
            return lambda *args, **kwargs: self._runner.run(value(*args, **kwargs))
        if inspect.isasyncgenfunction(value):
            return lambda *args, **kwargs: self._items(value(*args, **kwargs))
        return value

    def _items(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        while True:
            yield self._runner.run(_next(items))


async def _next(items: AsyncIterator[Any]) -> Any:
    return await anext(items)
