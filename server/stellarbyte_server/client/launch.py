"""Starts and watches the engine process, from its parent. Never imports the engine."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Protocol

import msgspec

from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.import_path import safe_environment
from stellarbyte_server.logs import LogFormat
from stellarbyte_server.protocol.adapter_versions import RecordedAdapters
from stellarbyte_server.protocol.messages import EngineInfo
from stellarbyte_server.protocol.start import EngineFailed, EngineReady, EngineStart

ENGINE_MODULE = "stellarbyte_server.engine.process"
_STOP_LIMIT_S = 5.0
_IPC_PATH_BYTES = 107  # longest path of a Unix socket


class EngineStartError(Exception):
    """The engine did not start; str() is one sentence for the user."""


class Engine(Protocol):
    """An engine, as seen by its clients: one process, or several in succession."""

    @property
    def endpoint(self) -> str:
        """The ZeroMQ address of the current process."""

    async def ready(self) -> EngineInfo:
        """Wait until it takes requests. Raises EngineStartError."""

    async def ended(self) -> str:
        """Wait, after `ready`, until the process has ended; returns how."""

    async def restarted(self) -> EngineInfo | None:
        """Wait, after `ended`, until another process takes requests, and return its info; None: there will be none."""

    def end_stalled(self) -> None:
        """End a process without progress, if another will replace it."""


class EngineProcess:
    """A running engine process, with its parent's ends of its pipes.

    The process ends on `stop`, and whenever this process ends.
    """

    def __init__(
        self,
        settings: EngineSettings,
        log_level: str,
        module: str = ENGINE_MODULE,
        log_format: LogFormat = "text",
        *,
        process_name: str = "engine",
        variables: Mapping[str, str] = MappingProxyType({}),
        recorded: RecordedAdapters | None = None,
        server_folder: Path | None = None,
    ) -> None:
        """Start the process; returns at once. `module` is run with `python -m`; tests replace it.

        Args:
            process_name: in log lines.
            variables: of its environment, in addition to this process's.
            recorded: the adapters that it has from the start.
            server_folder: which the process removes if this process ends without doing so.
        """
        self._folder = private_folder()
        self.endpoint = f"ipc://{self._folder}/engine"
        # A process group of its own: Ctrl-C in the terminal must reach only the parent.
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,
            env=engine_environment(os.environ) | dict(variables),
        )
        self._stdout: asyncio.StreamReader | None = None
        folders = (str(self._folder), *(() if server_folder is None else (str(server_folder),)))
        known = RecordedAdapters() if recorded is None else recorded
        start = EngineStart(settings, self.endpoint, log_level, log_format, process_name, known, folders)
        line = msgspec.json.encode(start) + b"\n"
        with contextlib.suppress(BrokenPipeError):  # already dead, which `ready` reports
            self._stdin.write(line)

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def process_id(self) -> int:
        return self._process.pid

    async def ready(self) -> EngineInfo:
        """Wait until the engine has loaded its model. Raises EngineStartError."""
        assert self._process.stdout is not None
        self._stdout = await _open_pipe(self._process.stdout)
        line = await self._stdout.readline()
        if not line:
            status = await asyncio.to_thread(self._process.wait)
            raise EngineStartError(f"the engine process ended while it loaded the model ({describe_status(status)})")
        state = msgspec.json.decode(line, type=EngineReady | EngineFailed)
        if isinstance(state, EngineFailed):
            raise EngineStartError(state.message)
        return state.info

    async def ended(self) -> str:
        """Wait, after `ready`, for the end of the process, which closes its stdout; returns how it ended."""
        assert self._stdout is not None
        await self._stdout.read()
        return describe_status(await asyncio.to_thread(self._process.wait))

    async def restarted(self) -> EngineInfo | None:
        return None

    def end_stalled(self) -> None:
        """Do nothing: no other process would follow."""

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()

    def stop(self) -> None:
        """End the process and wait for it; its requests are lost. May be called twice."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self._process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


async def _open_pipe(pipe: IO[bytes]) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    return reader


def engine_environment(ours: Mapping[str, str]) -> dict[str, str]:
    """The engine's environment: its Python imports nothing from the current folder, and OpenMP's threads spin only
    briefly, unless the user's variables say otherwise.

    By default they spin until all are scheduled, which is slow if another program uses one of few cores: with one of
    two cores busy the demo model generated 3.5 tokens a second, with this setting 10.1 (12.2 with both cores free).
    """
    if "GOMP_SPINCOUNT" in ours or "OMP_WAIT_POLICY" in ours:
        return safe_environment(ours)
    return {**safe_environment(ours), "GOMP_SPINCOUNT": "1000"}


def private_folder() -> Path:
    """A new folder that only this user may enter, with a path short enough for a Unix socket."""
    for parent in (None, "/tmp"):
        folder = Path(tempfile.mkdtemp(prefix="stellarbyte-", dir=parent))  # mode 0700
        if len(os.fsencode(folder / "engine")) <= _IPC_PATH_BYTES:
            return folder
        folder.rmdir()
    raise EngineStartError(
        "the path of the temporary folder is too long for a Unix socket; set TMPDIR to a shorter one"
    )


def describe_status(status: int) -> str:
    """An exit status as subprocess gives it, in words."""
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
