"""One load of a name at a time, over all HTTP processes of a server."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


class NameReserved(Exception):
    """Another call is loading an adapter under this name."""


@contextmanager
def reserved(folder: Path, name: str) -> Iterator[None]:
    """Reserve a name by a lock in a folder of the server; NameReserved. The lock ends with its process."""
    if not folder.is_dir():  # it was removed: the server ends
        yield
        return
    lock = FileLock(folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.lock", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise NameReserved(name) from None
    try:
        yield
    finally:
        lock.release()
