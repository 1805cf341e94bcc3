"""A folder that one process writes at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from stellarbyte.train.errors import TrainError

LOCK = ".lock"  # stays in the folder: a process that removed it could remove that of another


@contextmanager
def sole_writer(folder: Path, doing: str) -> Iterator[None]:
    """Make the folder and hold it; the lock of a process that dies is free.

    Raises:
        TrainError: another process is `doing` this there, such as "training into", or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout as error:
        raise TrainError(f"Another process is {doing} {folder}.") from error
    except (FileExistsError, PermissionError, NotADirectoryError) as error:
        raise TrainError(f"{folder} cannot be written: {error.strerror}.") from error
