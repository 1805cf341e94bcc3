"""Which cache blocks are free and which belong to a sequence. Plain Python; knows no tensors.

A sequence's sinks (its first `sink_tokens`) have blocks of their own, the last one padded, so that every block has a
single base position and the others can be freed in order. Block j of the others starts at sink_tokens + j · block_size.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """How positions map to blocks.

    `window`: tokens that stay visible, None when some layer sees everything (then no block is freed early).
    """

    block_size: int
    window: int | None
    sink_tokens: int

    @property
    def num_sink_blocks(self) -> int:
        return -(-self.sink_tokens // self.block_size)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold the first `num_tokens` positions, none freed."""
        sinks = -(-min(num_tokens, self.sink_tokens) // self.block_size)
        return sinks + -(-max(0, num_tokens - self.sink_tokens) // self.block_size)

    def peak_blocks(self, num_tokens: int, chunk: int) -> int:
        """Most blocks a sequence of `num_tokens` ever holds when at most `chunk` tokens are computed in a step."""
        everything = self.blocks_for(num_tokens)
        if self.window is None:
            return everything
        # The chunk's own tokens, the window - 1 before them, and a partly filled block at each end.
        live = -(-(self.window - 1 + chunk) // self.block_size) + 1
        return min(everything, self.num_sink_blocks + live)


class BlockPool:
    """The free blocks; every block is either here or in exactly one block table."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` block ids, or None (and nothing taken) when there are not so many."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: list[int]) -> None:
        self._free.extend(blocks)


class BlockTable:
    """The blocks of one sequence, in order of position."""

    def __init__(self, layout: CacheLayout) -> None:
        self.layout = layout
        self.sink_blocks: list[int] = []
        self.blocks: list[int] = []  # live ones after the sinks
        self.num_freed = 0  # blocks after the sinks that were freed; blocks[0] is number num_freed of them

    def missing(self, num_tokens: int) -> int:
        """How many blocks must be added before positions below `num_tokens` have a slot."""
        held = len(self.sink_blocks) + self.num_freed + len(self.blocks)
        return max(0, self.layout.blocks_for(num_tokens) - held)

    def add(self, blocks: list[int]) -> None:
        sinks = self.layout.num_sink_blocks - len(self.sink_blocks)
        self.sink_blocks += blocks[:sinks]
        self.blocks += blocks[sinks:]

    def locate(self, position: int) -> tuple[int, int]:
        """(block id, offset in the block) of a position whose block is live."""
        layout = self.layout
        if position < layout.sink_tokens:
            return self.sink_blocks[position // layout.block_size], position % layout.block_size
        number, offset = divmod(position - layout.sink_tokens, layout.block_size)
        return self.blocks[number - self.num_freed], offset

    def entries(self) -> list[tuple[int, int]]:
        """(block id, base position) of every live block, sinks first."""
        size = self.layout.block_size
        first = self.layout.sink_tokens + self.num_freed * size
        sinks = [(block, i * size) for i, block in enumerate(self.sink_blocks)]
        return sinks + [(block, first + i * size) for i, block in enumerate(self.blocks)]

    def pop_unseen(self, next_position: int) -> list[int]:
        """Remove and return the blocks that neither the query at `next_position` nor any later one can see."""
        layout = self.layout
        if layout.window is None:
            return []
        first_seen = next_position - layout.window + 1
        dead = (first_seen - layout.sink_tokens) // layout.block_size - self.num_freed
        dead = max(0, min(dead, len(self.blocks)))
        freed, self.blocks = self.blocks[:dead], self.blocks[dead:]
        self.num_freed += dead
        return freed

    def pop_all(self) -> list[int]:
        """Remove and return every block; the table is as new."""
        blocks = self.sink_blocks + self.blocks
        self.sink_blocks, self.blocks, self.num_freed = [], [], 0
        return blocks
