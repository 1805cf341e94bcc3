"""Starts the process that downloads an adapter, and ends it in time. Does not import `child`."""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping

import msgspec

from stellarbyte_server.config.adapter_source import AdapterSource
from stellarbyte_server.import_path import safe_environment
from stellarbyte_server.sources.outcome import Fetched, FetchError, NotFetched

CHILD_MODULE = "stellarbyte_server.sources.child"
FETCH_LIMIT_S = 600.0
MAX_WEIGHTS_BYTES = 4 * 2**30
_at_once = asyncio.Semaphore(4)  # downloads of this process; others wait
_END_LIMIT_S = 5.0  # for the removal of partial downloads


async def fetch(
    source: AdapterSource, *, limit_s: float = FETCH_LIMIT_S, max_bytes: int = MAX_WEIGHTS_BYTES
) -> AdapterSource:
    """Download an adapter into the cache folder, unless its newest version is there; returns it with that version.

    Args:
        max_bytes: of its weights.

    Raises:
        FetchError: the adapter does not exist, may not be read, is too large, or did not arrive in time.
    """
    async with _at_once:
        line = await _answer(source, limit_s, max_bytes)
    try:
        outcome = msgspec.json.decode(line, type=Fetched | NotFetched)
    except msgspec.DecodeError:
        raise FetchError(502, f"The process that downloads the adapter {source} ended without an answer.") from None
    if isinstance(outcome, NotFetched):
        raise FetchError(outcome.status, outcome.message)
    return source.at(outcome.source.partition("@")[2])


async def _answer(source: AdapterSource, limit_s: float, max_bytes: int) -> bytes:
    """The output of the downloading process; FetchError if it takes too long."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", CHILD_MODULE, str(source), str(max_bytes), str(limit_s + _END_LIMIT_S)),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=DEVNULL,
        process_group=0,  # Ctrl-C in the terminal must reach only the parent
        cwd=tempfile.gettempdir(),
        env=child_environment(os.environ),
    )
    try:
        async with asyncio.timeout(limit_s):
            line, _ = await process.communicate()
        return line
    except TimeoutError:
        raise FetchError(504, f"The adapter {source} did not arrive within {limit_s:g} seconds.") from None
    finally:
        await _end(process)


def child_environment(ours: Mapping[str, str]) -> dict[str, str]:
    """The environment, with settings of the Hub's and AWS' libraries and the cache, without this server's keys."""
    kept = {name: value for name, value in ours.items() if not _is_setting(name)}
    return safe_environment(kept) | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def _is_setting(name: str) -> bool:
    return name.startswith("STELLARBYTE_") and name != "STELLARBYTE_CACHE"


async def _end(process: Process) -> None:
    """End the process if it runs; first with a signal on which it removes partial downloads."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(_END_LIMIT_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
