"""The process that downloads one adapter: python -m stellarbyte_server.sources.child SOURCE MAX_BYTES LIMIT_S."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType

import msgspec

from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.staging import partial_folders, staged_folder
from stellarbyte.user_cache import adapter_cache
from stellarbyte_server.config.adapter_source import HUB, AdapterSource, folder_name
from stellarbyte_server.sources import hub, s3
from stellarbyte_server.sources.outcome import Fetched, FetchError, NotFetched
from stellarbyte_server.sources.remote import CONFIG_FILE, WEIGHTS_FILE, RemoteAdapter

NICENESS = 10
MAX_CONFIG_BYTES = 1_000_000  # as the engine reads
_ROOM = 2**20  # bytes that a file may be larger than allowed until writing it fails


def main() -> None:
    source, max_bytes, limit_s = AdapterSource.parse(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # so that output of libraries is not taken for the answer
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGALRM, _leave)
    signal.setitimer(signal.ITIMER_REAL, limit_s)  # the parent may have been killed
    # Bounds the download for any host: writing beyond it is an error.
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(max_bytes, MAX_CONFIG_BYTES) + _ROOM,) * 2)
    os.nice(NICENESS)
    outcome: Fetched | NotFetched
    try:
        outcome = Fetched(str(fetch_into_cache(source, max_bytes)))
    except FetchError as error:
        outcome = NotFetched(error.status, str(error))
    except CheckpointError as error:  # the cache folder cannot be written
        outcome = NotFetched(502, str(error))
    except Exception as error:  # of the libraries; their messages may contain signed addresses
        outcome = NotFetched(502, f"The adapter {source} cannot be fetched ({type(error).__name__}).")
    with answer:
        answer.write(msgspec.json.encode(outcome) + b"\n")


def fetch_into_cache(source: AdapterSource, max_bytes: int) -> AdapterSource:
    """Download a source's newest version to the cache folder; FetchError or CheckpointError."""
    remote = hub.find(source) if source.scheme == HUB else s3.find(source)
    pinned = source.at(remote.version)
    target = adapter_cache() / folder_name(str(pinned))
    if target.is_dir():
        return pinned
    limits = {CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: max_bytes}
    for name, limit in limits.items():
        _refuse_large(pinned, name, remote.sizes[name], limit)
    target.parent.mkdir(parents=True, exist_ok=True)
    for folder in partial_folders(target):  # of processes that were killed
        shutil.rmtree(folder, ignore_errors=True)
    try:
        with staged_folder(target) as staging:
            _download(remote, pinned, staging, limits)
    except CheckpointError:
        if not target.is_dir():  # otherwise another process was faster
            raise
    return pinned


def _download(remote: RemoteAdapter, pinned: AdapterSource, staging: Path, limits: dict[str, int]) -> None:
    scratch = staging / "download"
    for name, limit in limits.items():
        try:
            file = remote.download(name, scratch)
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise FetchError(400, f"{name} of {pinned} is larger than the limit of {limit} bytes.") from None
            raise
        _refuse_large(pinned, name, file.stat().st_size, limit)
        os.replace(file, staging / name)
    shutil.rmtree(scratch)


def _refuse_large(pinned: AdapterSource, name: str, num_bytes: int, limit: int) -> None:
    if num_bytes > limit:
        raise FetchError(400, f"{name} of {pinned} has {num_bytes} bytes; at most {limit} are allowed.")


def _leave(number: int, frame: FrameType | None) -> None:
    """Exit on a signal; this removes staged files."""
    del number, frame
    sys.exit(1)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        main()
