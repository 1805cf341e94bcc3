"""A folder that appears complete or not at all."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stellarbyte.checkpoint.errors import CheckpointError


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `target`; it is renamed to `target` at the end, or removed on any exception.

    This includes KeyboardInterrupt and SystemExit, so a program that turns SIGTERM into one of them leaves nothing
    behind.

    Raises:
        CheckpointError: `target` exists by then and is not an empty folder, or writing failed (disk full, no rights).
    """
    staging = target.parent / f"{_partial_prefix(target)}{secrets.token_hex(4)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        refuse_existing(target)  # another process may have been faster; an empty folder is replaced
        staging.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target} could not be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def partial_folders(target: Path) -> list[Path]:
    """The temporary folders of processes that write `target`, or were killed while they did."""
    prefix = _partial_prefix(target)
    return [folder for folder in target.parent.iterdir() if folder.name.startswith(prefix)]


def _partial_prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def refuse_existing(target: Path) -> None:
    """Raise CheckpointError unless `target` is absent or an empty folder."""
    if target.is_dir():
        if any(target.iterdir()):
            raise CheckpointError(f"{target} is not empty; give a folder that does not exist yet.")
    elif target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} exists and is not a folder.")
