"""Restarts of a failed engine process, and the messages that report them to HTTP workers."""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from stellarbyte_server.client.launch import EngineProcess, EngineStartError
from stellarbyte_server.config.settings import ServerSettings
from stellarbyte_server.protocol.adapter_versions import RecordedAdapters
from stellarbyte_server.protocol.messages import EngineInfo

logger = logging.getLogger("server.restart")

STEADY_AFTER_S = 60.0  # a process that ran this long resets the count of restarts in a row
PAUSE_S = 0.5  # after a process that failed to start


def restarts_left(left: int, most: int, lived_s: float) -> int:
    """The restarts that remain after one more, of `left`, for a process that took requests for `lived_s`."""
    return (most if lived_s >= STEADY_AFTER_S else left) - 1


def serves_the_same(old: EngineInfo, new: EngineInfo) -> bool:
    """Whether the engines are the same to clients: only the size of the cache may differ."""
    return old == msgspec.structs.replace(new, num_blocks=old.num_blocks)


class RestartingEngine:
    """Engine processes in succession; a `launch.Engine` for one reader, on one event loop.

    When a process ends, another follows, up to `restarts` times in a row.
    """

    def __init__(self, start: Callable[[], EngineProcess], restarts: int) -> None:
        """Start the first process; exceptions of `start` propagate."""
        self._start = start
        self._most = self._left = restarts
        self._process = start()
        self._info: EngineInfo | None = None
        self._ready_at_s = 0.0
        self._is_stopping = False

    @property
    def endpoint(self) -> str:
        return self._process.endpoint

    async def ready(self) -> EngineInfo:
        self._info = await self._process.ready()
        self._ready_at_s = time.monotonic()
        return self._info

    async def ended(self) -> str:
        return await self._process.ended()

    async def restarted(self) -> EngineInfo | None:
        lived_s = time.monotonic() - self._ready_at_s
        while not self._is_stopping and (left := restarts_left(self._left, self._most, lived_s)) >= 0:
            self._left, lived_s = left, 0.0
            logger.warning("starting another engine process; %d restarts are left", left)
            if (info := await self._start_another()) is not None:
                return info
            await asyncio.sleep(PAUSE_S)
        return None

    async def _start_another(self) -> EngineInfo | None:
        """Start another process; None: it does not take requests."""
        self._process.kill()  # one that failed may live on for seconds; at the end of its stdin it would remove folders
        await asyncio.to_thread(self._process.stop)  # removes its files
        if self._is_stopping:
            return None
        try:
            self._process = self._start()
            info = await self._process.ready()
        except (EngineStartError, OSError) as error:
            logger.error("the engine process could not be restarted: %s", error)
            return None
        if self._info is None or not serves_the_same(self._info, info):
            logger.error("the model's files have changed; restart the server")
            self._left = 0
            return None
        self._ready_at_s = time.monotonic()
        return info

    def end_stalled(self) -> None:
        if self._most:
            logger.error("the engine makes no progress; ending its process")
            self._process.kill()

    def stop(self) -> None:
        """End the process and wait for it; no other follows. May be called twice."""
        self._is_stopping = True
        self._process.stop()


class EngineEnded(msgspec.Struct, frozen=True, tag_field="news", tag="engine ended"):
    """The engine's process has ended."""

    replica: int = 0  # the engine's index, like the next


class EngineRestarted(msgspec.Struct, frozen=True, tag_field="news", tag="engine restarted"):
    """Another engine process takes requests."""

    endpoint: str
    num_blocks: int  # of its cache; the rest of its info is as before
    replica: int = 0


class EngineGone(msgspec.Struct, frozen=True, tag_field="news", tag="engine gone"):
    """No other engine process will start."""

    replica: int = 0


EngineNews = EngineEnded | EngineRestarted | EngineGone


class AttachedEngine:
    """An HTTP worker's view of an engine that its parent owns and reports on; a `launch.Engine` for one reader."""

    def __init__(self, info: EngineInfo, endpoint: str, so_far: Iterable[EngineNews] = ()) -> None:
        """`so_far`: news of the process at `endpoint`, if it no longer takes requests."""
        self.endpoint = endpoint
        self._info = info
        self._news: asyncio.Queue[EngineNews] = asyncio.Queue()
        for news in so_far:
            self.hear(news)

    def hear(self, news: EngineNews) -> None:
        """Note news of the engine; called on the event loop, in order."""
        self._news.put_nowait(news)

    async def ready(self) -> EngineInfo:
        return self._info

    async def ended(self) -> str:
        while not isinstance(await self._news.get(), EngineEnded):
            pass
        return "see the parent's log"

    async def restarted(self) -> EngineInfo | None:
        while True:
            news = await self._news.get()
            if isinstance(news, EngineRestarted):
                self.endpoint = news.endpoint
                self._info = msgspec.structs.replace(self._info, num_blocks=news.num_blocks)
                return self._info
            if isinstance(news, EngineGone):
                return None

    def end_stalled(self) -> None:
        """Do nothing: the parent ends it."""


def start_engines(
    settings: ServerSettings,
    module: str,
    variables: Sequence[Mapping[str, str]],
    folder: Path,
    engines: list[RestartingEngine],
    recorded: Callable[[], RecordedAdapters],
) -> None:
    """Start an engine for each entry of `variables`, of its process's environment; adds to `engines` as they start.

    `folder`: of the server, which engines remove if this process ends without doing so. `recorded` reads the record of
    adapters, anew for each process. EngineStartError or OSError.
    """
    for index, of_this in enumerate(variables):
        name = "engine" if len(variables) == 1 else f"engine-{index}"
        start = partial(
            _start_engine,
            recorded,
            dataclasses.replace(settings.engine, engine_index=index),
            settings.log_level,
            module,
            settings.log_format,
            process_name=name,
            variables=of_this,
            server_folder=folder,
        )
        engines.append(RestartingEngine(start, settings.restart_engine))


def _start_engine(recorded: Callable[[], RecordedAdapters], *args: Any, **fields: Any) -> EngineProcess:
    return EngineProcess(*args, recorded=recorded(), **fields)


def stop_engines(engines: Sequence[RestartingEngine]) -> None:
    """End all engines."""
    with ThreadPoolExecutor(max(1, len(engines))) as threads:  # each may take seconds
        list(threads.map(RestartingEngine.stop, engines))
