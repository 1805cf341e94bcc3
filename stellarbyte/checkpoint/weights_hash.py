"""The hash of a checkpoint's weights, computed from the files and stored in the user's cache.

Not stored in the checkpoint's folder, where its distributor could write any hash. A stored hash is valid only for a
file with the same path, inode, size and times; the kernel sets the time of a file's last status change, and no archive
can.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.safetensors_file import read_json
from stellarbyte.user_cache import cache_folder

CACHE_FILE = "weight-hashes.json"
SETTLED_NS = 1_000_000_000  # two changes within this time might get the same timestamp


class FileState(NamedTuple):
    """The metadata of a file that changes whenever the file does."""

    path: str
    inode: int
    num_bytes: int
    modified_ns: int
    changed_ns: int


def state_of(file: Path) -> FileState:
    """The current state of a file; CheckpointError if it does not exist."""
    try:
        path, status = file.resolve(), file.stat()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    return FileState(str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def states_of(files: Iterable[Path]) -> dict[Path, FileState]:
    """The current states of files."""
    return {file: state_of(file) for file in files}


def weights_hash(states: Mapping[Path, FileState]) -> str:
    """SHA-256 (hex) of weights: for one file as `sha256sum` prints it, for shards that of `sha256sum`'s listing.

    Args:
        states: of the files when they were opened to be loaded.

    Raises:
        CheckpointError: a file cannot be read, or has changed since it was opened.
    """
    kept = _kept()
    hashes = {}
    for file, state in sorted(states.items()):
        hashes[file] = _known(kept, state) or _hash_file(file)
        if state_of(file) != state:
            raise CheckpointError(f"{file} changed while it was loaded; start again.")
    new = {states[file]: digest for file, digest in hashes.items() if _known(kept, states[file]) is None}
    settled = {state: digest for state, digest in new.items() if time.time_ns() - state.changed_ns > SETTLED_NS}
    if settled:
        _keep(kept, settled)
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256("".join(f"{digest}  {file.name}\n" for file, digest in hashes.items()).encode()).hexdigest()


def keep_hashes(folder: Path, hashes: Mapping[str, str]) -> None:
    """Store the hashes of files that were just written (file name → SHA-256), so that no start computes them."""
    with contextlib.suppress(CheckpointError):  # the files have already been moved
        _keep(_kept(), {state_of(folder / name): digest for name, digest in hashes.items()})


def _hash_file(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error


def _kept() -> dict[str, Any]:
    """Path → state and hash; {} if nothing is stored."""
    with contextlib.suppress(CheckpointError, RuntimeError):  # RuntimeError: no home folder
        return read_json(cache_folder() / CACHE_FILE)
    return {}


def _known(kept: Mapping[str, Any], state: FileState) -> str | None:
    entry = kept.get(state.path)
    digest = entry.get("sha256") if isinstance(entry, dict) else None
    return digest if isinstance(digest, str) and entry == _entry(state, digest) else None


def _entry(state: FileState, digest: str) -> dict[str, object]:
    return {name: value for name, value in state._asdict().items() if name != "path"} | {"sha256": digest}


def _keep(kept: Mapping[str, Any], hashes: Mapping[FileState, str]) -> None:
    """Add hashes to the stored ones, and drop those of deleted files. Of two concurrent changes, one may be lost."""
    entries = {path: entry for path, entry in kept.items() if os.path.exists(path)}
    entries |= {state.path: _entry(state, digest) for state, digest in hashes.items()}
    partial: Path | None = None
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{CACHE_FILE}.{os.getpid()}"
        partial.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / CACHE_FILE)
    except (OSError, RuntimeError):  # read-only, full or no home: the next start hashes again
        with contextlib.suppress(OSError):
            if partial is not None:
                partial.unlink()
