"""Opens files inside a folder without following links."""

import errno
import os
from pathlib import Path

_FOLDER_FLAGS = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_inside(root: Path, path: str, flags: int) -> int:
    """Open a file inside `root` by a path without links; an opener for `open`.

    Opens each folder relative to the one before, without following links, so a link that has replaced a file or folder
    since the path was resolved cannot lead outside.

    Raises:
        OSError: the path has a link, or does not exist.
    """
    try:
        *folders, name = Path(path).relative_to(root).parts
    except ValueError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
    at = os.open(root, _FOLDER_FLAGS)
    try:
        for folder in folders:
            above, at = at, os.open(folder, _FOLDER_FLAGS, dir_fd=at)
            os.close(above)
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    finally:
        os.close(at)
