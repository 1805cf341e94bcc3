"""--http-workers above 1: starts HTTP processes on one port and one engine, and watches them.

A worker that ends unasked is replaced, while the others serve on: the engine drops the requests it had, new connections
of its share wait. When a worker cannot start, or the engine ends, everything ends. The workers do what the single HTTP
process does (`serving.serve`), so signals are only passed on to them.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable

import msgspec

from server.engine.launch import EngineProcess, describe_status
from server.engine.messages import EngineInfo
from server.keys import Key, on_hangup, read_keys_again
from server.settings import ServerSettings
from server.stopping import DEAD_ENGINE_GRACE_S, LAST_WORDS_S
from server.worker_protocol import WorkerFailed, WorkerReady, WorkerStart

logger = logging.getLogger("server.supervisor")

WORKER_MODULE = "server.http_worker"
_KILL_AFTER_S = 3.0  # beyond the time a worker may take to stop


class WorkerStartError(ValueError):
    """A worker did not start; str() is one sentence for the user."""


async def supervise(
    settings: ServerSettings,
    keys: tuple[Key, ...],
    listeners: list[socket.socket],
    engine: EngineProcess,
    started_at: int,
    on_started: Callable[[], None],
) -> int:
    """Run a worker for each listener until a signal or the engine's end; else as `serving.serve`.

    Raises EngineStartError, WorkerStartError or OSError when the server could not start.
    """
    supervisor = _Supervisor(settings, keys, listeners, engine, started_at)
    try:
        return await supervisor.run(on_started)
    finally:
        await supervisor.end_workers()


class _Supervisor:
    def __init__(
        self,
        settings: ServerSettings,
        keys: tuple[Key, ...],
        listeners: list[socket.socket],
        engine: EngineProcess,
        started_at: int,
    ) -> None:
        self._settings = settings
        self._keys = keys  # of the file, as last read
        self._listeners = dict(enumerate(listeners, 1))  # one for each worker
        self._engine = engine
        self._started_at = started_at
        self._workers: dict[int, Process] = {}  # by number, from 1
        self._serving: set[Process] = set()
        self._is_stopping = False

    async def run(self, on_started: Callable[[], None]) -> int:
        numbers = list(self._listeners)
        for number in numbers:
            await self._launch(number)  # they import what they need while the engine loads
        info = await self._engine.ready()
        await asyncio.gather(*(self._start(number, info) for number in numbers))
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signal_number, self._stop, signal_number)
        on_hangup(self._settings, self._read_keys_again)
        on_started()

        keepers = [asyncio.create_task(self._keep(number, info)) for number in numbers]
        engine_watcher = asyncio.create_task(self._watch_engine())
        await asyncio.wait([*keepers, engine_watcher], return_when=asyncio.FIRST_COMPLETED)  # something ends it all
        limit_s = self._settings.shutdown_timeout + DEAD_ENGINE_GRACE_S + LAST_WORDS_S + _KILL_AFTER_S
        await asyncio.wait(keepers, timeout=limit_s)
        has_failed = engine_watcher.done() or any(keeper.done() and keeper.exception() for keeper in keepers)
        return 1 if has_failed else 0

    async def _launch(self, number: int) -> None:
        """Start a process that waits for its first line. In a group of its own: Ctrl-C must reach only this one."""
        self._workers[number] = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            WORKER_MODULE,
            stdin=PIPE,
            stdout=PIPE,
            pass_fds=(self._listeners[number].fileno(), self._engine.end_fd),
            process_group=0,
        )

    async def _start(self, number: int, info: EngineInfo) -> None:
        """Tell a worker what to serve and wait until it does.

        Raises:
            WorkerStartError
        """
        worker = self._workers[number]
        assert worker.stdin is not None and worker.stdout is not None
        start = WorkerStart(
            number=number,
            settings=self._settings,
            keys=self._keys,
            listener_fd=self._listeners[number].fileno(),
            engine_end_fd=self._engine.end_fd,
            endpoint=self._engine.endpoint,
            info=info,
            started_at=self._started_at,
        )
        worker.stdin.write(msgspec.json.encode(start) + b"\n")
        line = await worker.stdout.readline()
        if not line:
            status = describe_status(await worker.wait())
            raise WorkerStartError(f"HTTP worker {number} ended while it started ({status})")
        state = msgspec.json.decode(line, type=WorkerReady | WorkerFailed)
        if isinstance(state, WorkerFailed):
            raise WorkerStartError(state.message)
        self._serving.add(worker)
        if self._keys != start.keys:
            self._tell_keys(worker)

    def _read_keys_again(self) -> None:
        self._keys = read_keys_again(self._settings, self._keys)
        for worker in self._workers.values():
            self._tell_keys(worker)

    def _tell_keys(self, worker: Process) -> None:
        """One that has not started yet hears of it from `_start`."""
        if worker.returncode is None and worker in self._serving:
            assert worker.stdin is not None
            worker.stdin.write(msgspec.json.encode(self._keys) + b"\n")

    async def _keep(self, number: int, info: EngineInfo) -> None:
        """Replace a worker whenever it ends, until the server stops; WorkerStartError when that fails."""
        while True:
            status = await self._workers[number].wait()
            self._serving.discard(self._workers[number])
            if self._is_stopping:
                return
            logger.error("HTTP worker %d ended (%s); starting another", number, describe_status(status))
            try:
                await self._launch(number)
                if self._is_stopping:  # it was not there yet when the others were told
                    self._workers[number].terminate()
                await self._start(number, info)
            except (ValueError, OSError) as error:  # ValueError: WorkerStartError, or what it said is not understood
                if not self._is_stopping:
                    logger.error("%s; the server ends", error)
                    self._stop(signal.SIGTERM)
                    raise

    async def _watch_engine(self) -> None:
        how = await self._engine.ended()
        if not self._is_stopping:
            logger.error("the engine process ended (%s)", how)
        self._is_stopping = True  # the workers see its end as well and end by themselves

    def _stop(self, signal_number: int) -> None:
        """Let the workers finish their requests; a second Ctrl-C makes them stop at once."""
        forwarded = signal_number if self._is_stopping else signal.SIGTERM
        self._is_stopping = True
        for worker in self._workers.values():
            if worker.returncode is None:
                worker.send_signal(forwarded)

    async def end_workers(self) -> None:
        """Kill those that are left."""
        for worker in self._workers.values():
            with contextlib.suppress(ProcessLookupError):
                worker.kill()
            await worker.wait()
