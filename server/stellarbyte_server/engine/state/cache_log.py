"""What changed in the prefix cache: blocks that got a key and blocks that lost it, in order. Plain data."""

from array import array
from typing import NamedTuple


class BlockOrigin(NamedTuple):
    """What the blocks of a sequence depend on besides their tokens."""

    adapter: str | None  # name
    adapter_hash: str
    adapter_scale: float
    salt: str
    adapter_start: int | None = None  # position of the first token that has an activated adapter; None: all have it


class StoredBlock(NamedTuple):
    """A full block that can now be found by its key."""

    key: bytes
    parent: bytes | None  # key of the block before it; None: it is the first
    tokens: "array[int]"
    origin: BlockOrigin


class CacheLog:
    """Engine thread only."""

    def __init__(self) -> None:
        self._changes: list[StoredBlock | bytes] = []

    def add(self, change: StoredBlock | bytes) -> None:
        """A stored block, or the key of a removed one."""
        self._changes.append(change)

    def take(self) -> list[StoredBlock | bytes]:
        """The changes since the last call."""
        changes, self._changes = self._changes, []
        return changes
