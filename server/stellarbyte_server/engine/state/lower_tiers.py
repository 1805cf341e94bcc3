"""The tiers below the pool, which keep the content of its blocks, as pool and scheduler see them. Without tensors."""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple, Protocol


class LoadedBlock(NamedTuple):
    """A block of a load that has ended. Without `is_filled` its content is not that of its key."""

    key: bytes
    block: int
    is_filled: bool


class BlockLoad:
    """Blocks that another thread fills from lower tiers, one after another.

    The engine thread may take blocks from the right end of `pending` again; the other thread takes from the left.
    """

    def __init__(self, blocks: Iterable[tuple[bytes, int]]) -> None:
        self.pending = deque(blocks)  # keys and blocks, not begun
        self.done: deque[LoadedBlock] = deque()
        self.discarded: set[bytes] = set()  # keys whose content is wrong, as became known meanwhile


class LowerTiers(Protocol):
    """Called by the engine thread only; nothing here waits for a device or a disk."""

    def has(self, key: bytes) -> bool:
        """Whether a tier probably has the content of this key."""

    def store(self, key: bytes, block: int) -> None:
        """Copy the content of a block that got this key. It is dropped if the block loses the key first."""

    def lose(self, block: int) -> None:
        """Note that a block has lost its key: from now on other content may be written to it."""

    def discard(self, key: bytes) -> None:
        """Forget the content of a key, which is wrong or of no further use."""

    def touch(self, keys: Iterable[bytes]) -> None:
        """Note the use of keys: what is used last is kept longest."""

    def load(self, load: BlockLoad) -> None:
        """Fill the blocks of a load, which nothing else writes or reads until it is in `take_ended`."""

    def take_ended(self) -> list[BlockLoad]:
        """The loads that have ended since the last call: of them no block is pending or being filled."""
        ...
