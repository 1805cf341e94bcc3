"""A bounded folder of blocks' files, which several engines may share.

Nothing in it needs to be durable: a file that a crash leaves incomplete is recognised when read. Writers and removers
hold a lock on the file `lock`, which also has the bytes of all blocks' files, so that no engine exceeds the bound. A
file's modification time is that of its last use.
"""

import contextlib
import fcntl
import logging
import os
import re
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stellarbyte_server.engine.offload.block_file import (
    HEADER_BYTES,
    BlockFileError,
    BlockName,
    prefix_of,
    read_block_file,
    write_block_file,
)

logger = logging.getLogger("server.engine")

_NAME = re.compile(r"[0-9a-f]{16}-([0-9a-f]{64})\.kv")
_STATE = struct.Struct("<QQ")  # bytes of all blocks' files; number of changes
_LOCK, _UNFINISHED = "lock", "unfinished"
_SPARED_SHARE = 16  # an eviction frees a part of the bound, since it reads the whole folder


class BlockFolder:
    """Blocks of one identity in a folder with any. `read` is for one thread; unless noted, all else for another.

    Raises:
        OSError: the folder cannot be made, written or locked.
    """

    def __init__(self, folder: Path, max_bytes: int, identity: bytes, block_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._identity = identity
        self._file_bytes = HEADER_BYTES + block_bytes
        self._known: set[bytes] = set()  # keys; those of other engines since the last listing are missing
        self._forgotten: Counter[bytes] = Counter()  # calls of `forget` whose `remove` has not ended
        self._forgotten_lock = threading.Lock()
        self._seen_change = 0
        self._used_ns = 0
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with self._locked():
            (folder / _UNFINISHED).unlink(missing_ok=True)
            self._make_room(0)

    def close(self) -> None:
        """Nothing but `read` may follow."""
        os.close(self._lock_fd)

    @property
    def num_known(self) -> int:
        """Blocks of this identity that are known."""
        return len(self._known)

    def has(self, key: bytes) -> bool:
        """For any thread."""
        return key in self._known and key not in self._forgotten

    def read(self, key: bytes, out: np.ndarray) -> bool:
        """Fill `out`, uint8 [N], with a block; False if there is no valid file. An invalid one is removed."""
        if key in self._forgotten:
            return False
        path = self._path(key)
        try:
            read_block_file(path, BlockName(identity=self._identity, key=key), out)
        except FileNotFoundError:  # evicted by another engine
            self._known.discard(key)
            return False
        except (BlockFileError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            logger.warning("--kv-offload-dir: ignored %s: %s", path, reason)
            self._known.discard(key)
            with contextlib.suppress(OSError):
                path.unlink()
            return False
        return True

    def write(self, key: bytes, content: np.ndarray) -> bool:
        """Add a block, uint8 [N], and remove those longest unused if it exceeds the bound; False: it was there.

        Raises:
            OSError: such as a full disk. Nothing is left of the file.
        """
        path, unfinished = self._path(key), self._folder / _UNFINISHED
        with self._locked():
            if path.exists():
                self._known.add(key)
                return False
            if self._state()[0] + self._file_bytes > self._max_bytes:
                self._make_room(max(self._file_bytes, self._max_bytes // _SPARED_SHARE))
            try:
                write_block_file(unfinished, BlockName(identity=self._identity, key=key), content)
                unfinished.rename(path)
            except OSError:
                with contextlib.suppress(OSError):
                    unfinished.unlink(missing_ok=True)
                raise
            os.utime(path, ns=self._now())
            self._change(self._file_bytes)
        self._known.add(key)
        return True

    def touch(self, key: bytes) -> None:
        """Note the use of a block, if it is there."""
        if key in self._known:
            with contextlib.suppress(OSError):
                os.utime(self._path(key), ns=self._now())

    def forget(self, key: bytes) -> None:
        """Find a block no more, whatever is written meanwhile, until `remove`, which follows. For any thread."""
        with self._forgotten_lock:
            self._forgotten[key] += 1

    def remove(self, key: bytes) -> None:
        """Remove a block that was forgotten, if it is there.

        Raises:
            OSError: it is still there, and stays forgotten.
        """
        path = self._path(key)
        self._known.discard(key)
        if path.exists():
            with self._locked(), contextlib.suppress(FileNotFoundError):
                path.unlink()
                self._change(-self._file_bytes)
        with self._forgotten_lock:  # not after another error: the file is still there
            self._forgotten[key] -= 1
            if self._forgotten[key] <= 0:
                del self._forgotten[key]

    def refresh(self) -> None:
        """Find the blocks that other engines have added."""
        change = self._state()[1]
        if change != self._seen_change:
            self._seen_change = change
            self._known = self._keys_of(os.listdir(self._folder))

    def _path(self, key: bytes) -> Path:
        return self._folder / BlockName(identity=self._identity, key=key).file_name

    def _keys_of(self, names: list[str]) -> set[bytes]:
        prefix = prefix_of(self._identity)
        matches = (_NAME.fullmatch(name) for name in names if name.startswith(prefix))
        return {bytes.fromhex(match[1]) for match in matches if match is not None}

    def _make_room(self, num_bytes: int) -> None:
        """Remove the files longest unused until `num_bytes` are free below the bound. The lock is held."""
        files = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if _NAME.fullmatch(entry.name) is not None:
                    with contextlib.suppress(OSError):  # removed as invalid by another engine
                        stat = entry.stat(follow_symlinks=False)
                        files.append((stat.st_mtime_ns, entry.name, stat.st_size))
        order = np.argsort(np.array([used_ns for used_ns, _, _ in files], np.int64))  # without Python's lock
        total, num_removed = sum(size for _, _, size in files), 0
        while num_removed < len(files) and total + num_bytes > self._max_bytes:
            _, name, size = files[order[num_removed]]
            (self._folder / name).unlink(missing_ok=True)
            total -= size
            num_removed += 1
        self._change(total - self._state()[0])
        self._known = self._keys_of([files[number][1] for number in order[num_removed:]])

    def _state(self) -> tuple[int, int]:
        state = os.pread(self._lock_fd, _STATE.size, 0)
        return _STATE.unpack(state) if len(state) == _STATE.size else (0, 0)

    def _change(self, num_bytes: int) -> None:
        """Note a change of the folder by so many bytes. The lock is held."""
        total, change = self._state()
        os.pwrite(self._lock_fd, _STATE.pack(max(0, total + num_bytes), change + 1), 0)
        if change == self._seen_change:  # else the next `refresh` finds what others have changed
            self._seen_change = change + 1

    def _now(self) -> tuple[int, int]:
        """Times of access and modification, later than those before."""
        self._used_ns = max(time.time_ns(), self._used_ns + 1)
        return self._used_ns, self._used_ns

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
