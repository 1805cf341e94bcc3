"""The folder --data-dir: its locks and layout. No file outside it is read or written.

Names of files are made by the server; folders are opened once, and no link is followed below --data-dir.

    lock, runner.lock   held by the server, and by the HTTP process that runs batches
    index.sqlite3       the index of files and batches (see index.py)
    files/ID            the content of a file
    uploads/NAME        files that are being received; emptied at the start
    work/ID.output      answers of a running batch, and work/ID.errors
"""

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import BinaryIO, Literal

Place = Literal["files", "uploads", "work"]
PLACES: tuple[Place, ...] = ("files", "uploads", "work")
INDEX = "index.sqlite3"
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class DataFolderError(ValueError):
    """The folder cannot be used; str() is one sentence for the user."""


class DataFolder:
    """The folder --data-dir, opened by one process. Any thread."""

    def __init__(self, path: str) -> None:
        """Open the folder and create missing subfolders; DataFolderError."""
        self.path = Path(path)
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._root = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._folders = {place: self._open_folder(place) for place in PLACES}
            self._refuse_link(INDEX)
        except OSError as error:
            raise DataFolderError(f"cannot use the folder {path}: {error.strerror or error}") from None

    def _open_folder(self, place: Place) -> int:
        try:
            os.mkdir(place, 0o700, dir_fd=self._root)
        except FileExistsError:
            pass
        return os.open(place, _FOLDER_FLAGS, dir_fd=self._root)

    def _refuse_link(self, name: str) -> None:
        """Open a plain file; OSError if the name is something else."""
        try:
            mode = os.lstat(name, dir_fd=self._root).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, f"{name} is not a plain file")

    def lock(self, name: str) -> int | None:
        """Take a lock of the folder. Returns a file descriptor that holds it until closed; None: it is taken."""
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._root)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock

    def open(self, place: Place, name: str, mode: Literal["rb", "xb", "ab"]) -> BinaryIO:
        """Open a file unbuffered; OSError."""

        def opener(path: str, flags: int) -> int:
            return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._folders[place])

        return open(name, mode, buffering=0, opener=opener)

    def move(self, place: Place, name: str, to: Place, new_name: str) -> None:
        """Move a file durably."""
        os.replace(name, new_name, src_dir_fd=self._folders[place], dst_dir_fd=self._folders[to])
        os.fsync(self._folders[to])

    def remove(self, place: Place, name: str) -> None:
        """Remove a file if it exists."""
        try:
            os.unlink(name, dir_fd=self._folders[place])
        except FileNotFoundError:
            pass

    def size(self, place: Place, name: str) -> int | None:
        """The size of a file in bytes; None if it does not exist."""
        try:
            return os.stat(name, dir_fd=self._folders[place], follow_symlinks=False).st_size
        except FileNotFoundError:
            return None

    def names(self, place: Place) -> list[str]:
        return os.listdir(self._folders[place])

    def close(self) -> None:
        for folder in (self._root, *self._folders.values()):
            os.close(folder)
