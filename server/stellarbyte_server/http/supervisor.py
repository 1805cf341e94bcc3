"""--http-workers above 1: starts HTTP processes on one port and the server's engines, and watches them.

A worker that ends unexpectedly is replaced while the others continue: the engine drops its requests, and new
connections of its share wait. This process is also a client of the engines, only to watch them, and tells the workers
about restarts. If a worker cannot start, or the last engine ends without a successor, the server ends. The workers run
`serving.serve` like a single HTTP process, so signals are passed on to them.
"""

import asyncio
import contextlib
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from stellarbyte_server.access.keys import Key, on_hangup, read_keys_again
from stellarbyte_server.client.launch import describe_status
from stellarbyte_server.client.replicas.replicas import Replicas
from stellarbyte_server.client.restart import EngineGone, EngineNews, EngineRestarted, RestartingEngine
from stellarbyte_server.config.settings import ServerSettings
from stellarbyte_server.http.listeners import Listeners
from stellarbyte_server.http.stopping import DEAD_ENGINE_GRACE_S, LAST_WORDS_S, call_on_stop_signals
from stellarbyte_server.http.worker_protocol import EngineState, NewKeys, News, WorkerFailed, WorkerReady, WorkerStart
from stellarbyte_server.import_path import safe_environment

logger = logging.getLogger("server.supervisor")

WORKER_MODULE = "stellarbyte_server.http.worker"
_KILL_AFTER_S = 3.0  # in addition to a worker's time to stop


class WorkerStartError(ValueError):
    """A worker did not start; str() is one sentence for the user."""


class Supervisor:
    """A worker for each listener, all on the same engines."""

    def __init__(
        self,
        settings: ServerSettings,
        keys: tuple[Key, ...],
        listeners: list[Listeners],
        engines: Sequence[RestartingEngine],
        folder: Path,
        started_at: int,
    ) -> None:
        """`folder`: of the server, as in `Replicas`."""
        self._settings = settings
        self._keys = keys  # of the file, as last read
        self._listeners = dict(enumerate(listeners, 1))  # one for each worker
        self._engines = engines
        self._folder = folder
        self._ends: list[tuple[EngineNews, ...]] = [() for _ in engines]  # of each engine's newest process
        self._started_at = started_at
        self._workers: dict[int, Process] = {}  # by number, from 1
        self._told_start: set[Process] = set()  # workers that get further news
        self._engine_is_up = asyncio.Event()  # at least one
        self._is_stopping = False

    async def run(self, on_started: Callable[[], None]) -> int:
        """Run until a signal or the engine's end; once only. Otherwise as `serving.serve`.

        Raises:
            EngineStartError, WorkerStartError, OSError: the server could not start.
        """
        client = self._client = Replicas(self._engines, self._folder, self._hear_of_engine)
        try:
            for number in self._listeners:
                await self._launch(number)  # they import modules while the engine loads
            await client.start()
            try:
                return await self._run_with(client, on_started)
            finally:
                await client.close()
        finally:
            await self._end_workers()

    async def _run_with(self, client: Replicas, on_started: Callable[[], None]) -> int:
        numbers = list(self._listeners)
        self._engine_is_up.set()
        call_on_stop_signals(asyncio.get_running_loop(), self._stop)  # the first worker may serve before the last
        starts = await asyncio.gather(*(self._start(number) for number in numbers), return_exceptions=True)
        failed = [error for error in starts if isinstance(error, BaseException)]
        if failed and not self._is_stopping:
            raise failed[0]
        on_hangup(self._settings, self._read_keys_again)
        on_started()

        keepers = [asyncio.create_task(self._keep(number)) for number in numbers]
        engine_watcher = asyncio.create_task(client.dead.wait())
        await asyncio.wait({*keepers, engine_watcher}, return_when=asyncio.FIRST_COMPLETED)  # the server ends
        limit_s = self._settings.shutdown_timeout + DEAD_ENGINE_GRACE_S + LAST_WORDS_S + _KILL_AFTER_S
        await asyncio.wait(keepers, timeout=limit_s)
        has_failed = engine_watcher.done() or any(keeper.done() and keeper.exception() for keeper in keepers)
        return 1 if has_failed else 0

    async def _launch(self, number: int) -> None:
        """Start a process, which waits for its first line. In its own process group: Ctrl-C must reach only this
        one."""
        self._workers[number] = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            WORKER_MODULE,
            stdin=PIPE,
            stdout=PIPE,
            pass_fds=self._listeners[number].filenos,
            process_group=0,
            env=safe_environment(os.environ),
        )

    async def _start(self, number: int) -> None:
        """Send a worker its start message, once there is an engine, and wait until it serves.

        Raises:
            WorkerStartError
        """
        await self._engine_is_up.wait()
        worker = self._workers[number]
        if self._is_stopping:
            worker.kill()
            raise WorkerStartError("the server is stopping")
        assert worker.stdin is not None and worker.stdout is not None
        listeners = self._listeners[number]
        start = WorkerStart(
            number=number,
            settings=self._settings,
            keys=self._keys,
            listener_fd=listeners.public.fileno(),
            admin_fd=None if listeners.admin is None else listeners.admin.fileno(),
            engines=tuple(
                EngineState(endpoint=engine.endpoint, so_far=ends, past=past, info=client.info)
                for engine, ends, past, client in zip(
                    self._engines, self._ends, self._client.past, self._client.clients, strict=True
                )
            ),
            folder=str(self._folder),
            started_at=self._started_at,
        )
        worker.stdin.write(msgspec.json.encode(start) + b"\n")
        self._told_start.add(worker)
        line = await worker.stdout.readline()
        if not line:
            status = describe_status(await worker.wait())
            raise WorkerStartError(f"HTTP worker {number} ended during its start ({status})")
        state = msgspec.json.decode(line, type=WorkerReady | WorkerFailed)
        if isinstance(state, WorkerFailed):
            raise WorkerStartError(state.message)

    def _read_keys_again(self) -> None:
        self._keys = read_keys_again(self._settings, self._keys)
        self._tell_workers(NewKeys(self._keys))

    def _hear_of_engine(self, news: EngineNews) -> None:
        self._ends[news.replica] = () if isinstance(news, EngineRestarted) else (*self._ends[news.replica], news)
        are_gone = all(EngineGone(replica) in ends for replica, ends in enumerate(self._ends))
        self._is_stopping |= are_gone  # the workers end by themselves
        if are_gone or not all(self._ends):
            self._engine_is_up.set()
        else:
            self._engine_is_up.clear()
        self._tell_workers(news)

    def _tell_workers(self, news: News) -> None:
        """Send news to all started workers; the others get the current state when they start."""
        line = msgspec.json.encode(news) + b"\n"
        for worker in self._workers.values():
            if worker.returncode is None and worker in self._told_start:
                assert worker.stdin is not None
                worker.stdin.write(line)

    async def _keep(self, number: int) -> None:
        """Replace a worker whenever it ends, until the server stops; WorkerStartError if that fails."""
        while True:
            status = await self._workers[number].wait()
            self._told_start.discard(self._workers[number])
            if self._is_stopping:
                self._listeners[number].close()  # otherwise new connections of its share would wait for ever
                return
            logger.error("HTTP worker %d ended (%s); starting another", number, describe_status(status))
            try:
                await self._launch(number)
                await self._start(number)
            except (ValueError, OSError) as error:  # ValueError: WorkerStartError, or an invalid message
                if not self._is_stopping:
                    logger.error("%s; the server ends", error)
                    self._stop()
                    raise

    def _stop(self) -> None:
        """Let the workers drain; a second signal stops them at once."""
        self._is_stopping = True
        self._engine_is_up.set()  # release waiters
        for worker in self._workers.values():
            if worker.returncode is None:
                worker.terminate()

    async def _end_workers(self) -> None:
        """Kill the remaining workers."""
        for worker in self._workers.values():
            with contextlib.suppress(ProcessLookupError):
                worker.kill()
            await worker.wait()
