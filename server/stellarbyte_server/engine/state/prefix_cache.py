"""Finds the cached prefix of a sequence, by keys and block ids.

A full block's key is a hash of its parent's key and its own tokens, so it identifies every token from the start of the
sequence. So invisible blocks need not exist: a query sees the sinks and the window, and if those blocks have the keys,
all tokens before them are equal, too.
"""

import hashlib
from array import array
from dataclasses import dataclass
from typing import Protocol

from stellarbyte_server.engine.state.block_pool import CacheLayout


class BlockKeys:
    """The keys of one sequence's full blocks, computed as they fill: one hash for each block.

    `salt`: further condition for sharing, in place of the first block's parent. `later`: a position and another
    condition, for the block that holds it and those after it.
    """

    def __init__(self, layout: CacheLayout, salt: bytes, later: tuple[int, bytes] | None = None) -> None:
        self._layout = layout
        self._root = self._parent = hashlib.sha256(salt).digest()
        self._later_at, later_salt = (-1, b"") if later is None else later
        self._later = hashlib.sha256(later_salt).digest()
        self._start = 0  # of the first block without a key
        self.next_end = layout.block_end(0)
        self.keys: list[bytes] = []

    def extend(self, tokens: "array[int]", num_tokens: int) -> None:
        """Add the keys of blocks that are full with the first `num_tokens` of `tokens` (32-bit unsigned)."""
        while self.next_end <= num_tokens:
            content = tokens[self._start : self.next_end].tobytes()
            if self._start <= self._later_at < self.next_end:
                content = self._later + content
            self._parent = hashlib.sha256(self._parent + content).digest()
            self.keys.append(self._parent)
            self._start, self.next_end = self.next_end, self._layout.block_end(len(self.keys))

    def rewind(self, num_tokens: int) -> None:
        """Forget the keys of blocks that end after the first `num_tokens`, as other tokens will fill them."""
        while self._start > num_tokens:
            self.keys.pop()
            self._start, self.next_end = self._layout.block_end(len(self.keys) - 1) if self.keys else 0, self._start
        self._parent = self.keys[-1] if self.keys else self._root


class BlockFinder(Protocol):
    """Where blocks are looked up, such as a `BlockPool`."""

    def find(self, key: bytes) -> int | None:
        """The block with this key; None: there is none."""
        ...


@dataclass(frozen=True, kw_only=True)
class CachedPrefix:
    """The cached first `num_tokens` of a sequence, with all their blocks that later queries see.

    `num_unseen`: number of blocks between the sinks and `blocks`. The blocks are not held yet.
    """

    num_tokens: int
    sink_blocks: tuple[int, ...]
    num_unseen: int
    blocks: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        """Blocks of the sequence up to `num_tokens`, including unseen ones."""
        return len(self.sink_blocks) + self.num_unseen + len(self.blocks)


NOTHING_CACHED = CachedPrefix(num_tokens=0, sink_blocks=(), num_unseen=0, blocks=())


def find_prefix(keys: list[bytes], layout: CacheLayout, pool: BlockFinder) -> CachedPrefix:
    """The longest prefix, in whole blocks, with all visible blocks in the pool. Looks up each key once."""
    sinks: list[int] = []
    for key in keys[: layout.num_sink_blocks]:
        block = pool.find(key)
        if block is None:
            break
        sinks.append(block)
    last = len(keys) - 1 if len(sinks) == layout.num_sink_blocks else -1
    while last >= len(sinks):
        end = layout.block_end(last)
        num_unseen = layout.num_unseen_blocks(end)
        blocks: list[int] = []
        for number in range(last, len(sinks) + num_unseen - 1, -1):
            block = pool.find(keys[number])
            if block is None:
                last = number - 1  # every longer prefix needs this block
                break
            blocks.append(block)
        else:
            return CachedPrefix(
                num_tokens=end, sink_blocks=tuple(sinks), num_unseen=num_unseen, blocks=tuple(blocks[::-1])
            )
    return CachedPrefix(num_tokens=layout.capacity(len(sinks)), sink_blocks=tuple(sinks), num_unseen=0, blocks=())
