"""The pool of cache blocks: free blocks, holders, and keys of full blocks. No tensors.

A sequence's sinks (its first `sink_tokens`) have separate blocks, the last one padded, so that every block has a single
base position and the others can be freed in order. Blocks are numbered over the sequence, sinks first.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from stellarbyte_server.engine.state.cache_log import CacheLog
from stellarbyte_server.engine.state.lower_tiers import LowerTiers


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """How positions map to blocks.

    `window`: tokens that stay visible in the widest layer, None if a layer has no window (then no block is freed
    early). `num_steps_ahead`: steps scheduled before the blocks that an earlier step made invisible are freed.
    """

    block_size: int
    window: int | None
    sink_tokens: int
    num_steps_ahead: int = 0

    @cached_property
    def num_sink_blocks(self) -> int:
        return -(-self.sink_tokens // self.block_size)

    def block_end(self, number: int) -> int:
        """The position after the last one of block `number`; a sink block ends with the sinks."""
        sinks = self.num_sink_blocks
        if number < sinks:
            return min((number + 1) * self.block_size, self.sink_tokens)
        return self.sink_tokens + (number + 1 - sinks) * self.block_size

    def capacity(self, num_blocks: int) -> int:
        """Number of a sequence's positions in its first `num_blocks` blocks."""
        return self.block_end(num_blocks - 1) if num_blocks else 0

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks of the first `num_tokens` positions, without freeing any."""
        sinks = -(-min(num_tokens, self.sink_tokens) // self.block_size)
        return sinks + -(-max(0, num_tokens - self.sink_tokens) // self.block_size)

    def peak_blocks(self, num_tokens: int, chunk: int) -> int:
        """Most blocks that a sequence of `num_tokens` holds if a step computes at most `chunk` tokens.

        Blocks are freed when another one is full (see `Scheduler`), so the window counts from there.
        """
        everything = self.blocks_for(num_tokens)
        if self.window is None:
            return everything
        return min(everything, self._windowed_blocks(chunk))

    def _windowed_blocks(self, chunk: int) -> int:
        assert self.window is not None
        before_full = -(-(self.window - 1) // self.block_size)
        after_full = -(-(self.block_size - 1 + chunk * (1 + self.num_steps_ahead)) // self.block_size)
        return self.num_sink_blocks + before_full + after_full

    @property
    def visible_tokens(self) -> int:
        """Most tokens that a query sees; the window must not be None."""
        assert self.window is not None
        return self.sink_tokens + self.window

    @property
    def steady_blocks(self) -> int:
        """Most blocks that a sequence of any length holds while it decodes; the window must not be None."""
        return self._windowed_blocks(1)

    def num_unseen_blocks(self, position: int) -> int:
        """Number of blocks after the sinks that neither the query at `position` nor a later one sees."""
        if self.window is None:
            return 0
        return max(0, (position - self.window + 1 - self.sink_tokens) // self.block_size)

    def evicted_tokens(self, num_tokens: int) -> int:
        """Number of a sequence's first `num_tokens` that its newest one sees in no layer."""
        return 0 if self.window is None else max(0, num_tokens - self.sink_tokens - self.window)


class BlockPool:
    """All blocks. A block is held by the sequences that have it in their tables, or free.

    A full block may have a key (see `prefix_cache`) of its content. A free block keeps content and key until it is
    taken: first blocks without a key, the last freed first (so that a single sequence stays in memory already in use),
    then the block that has been free longest.
    """

    def __init__(self, num_blocks: int, log: CacheLog | None = None, tiers: LowerTiers | None = None) -> None:
        """`log` gets the keys that blocks lose, `tiers` the blocks; who names blocks adds those to both."""
        self.num_blocks = num_blocks
        self.log = log
        self.tiers = tiers
        self._holders = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))  # free, without a key
        self._idle: OrderedDict[int, None] = OrderedDict()  # free, with a key; longest free first

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def take(self, count: int) -> list[int] | None:
        """Take `count` blocks for one holder; None, without taking any, if there are fewer."""
        if count > self.num_free:
            return None
        blocks = []
        for _ in range(count):
            block = self._blank.pop() if self._blank else self._take_longest_idle()
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def find(self, key: bytes) -> int | None:
        """The block with this key, held or free."""
        return self._block_of.get(key)

    def num_held(self, blocks: Iterable[int]) -> int:
        """Number of the blocks that are held."""
        return sum(self._holders[block] > 0 for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to blocks found by their keys."""
        for block in blocks:
            if not self._holders[block]:
                del self._idle[block]
            self._holders[block] += 1

    def name(self, block: int, key: bytes) -> bool:
        """Give a full block its key, unless another block has it; returns whether it got it."""
        if key in self._block_of:
            return False
        self._block_of[key] = block
        self._keys[block] = key
        return True

    def unname(self, block: int) -> bool:
        """Remove a block's key before other content is written to it; False if it has other holders."""
        if self._holders[block] > 1:
            return False
        self._forget(block)
        return True

    def give_back(self, blocks: Iterable[int], *, keep_content: bool = True) -> None:
        """Remove a holder of each block; of the freed blocks the first is reused first.

        Without `keep_content` freed blocks lose their keys, and lower tiers their content.
        """
        for block in blocks:
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if not keep_content:
                key = self._keys[block]
                self._forget(block)
                if self.tiers is not None and key is not None:
                    self.tiers.discard(key)
            if self._keys[block] is None:
                self._blank.append(block)
            else:
                self._idle[block] = None

    def _take_longest_idle(self) -> int:
        block, _ = self._idle.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        key, self._keys[block] = self._keys[block], None
        if key is not None:
            del self._block_of[key]
            if self.tiers is not None:
                self.tiers.lose(block)
            if self.log is not None:
                self.log.add(key)


class BlockTable:
    """The blocks of one sequence, in order of position."""

    def __init__(self, layout: CacheLayout) -> None:
        self.layout = layout
        self.sink_blocks: list[int] = []
        self.blocks: list[int] = []  # live ones after the sinks
        self.num_freed = 0  # blocks after the sinks that were freed; blocks[0] is number num_freed of them
        self.capacity = 0  # positions below it have, or had, a block
        self.generation = 0  # number of times emptied
        self.changes = 0  # number of changes
        self._num_told_sinks = 0  # of `sink_blocks`, returned by `take_untold`
        self._num_told = 0  # of the others, including freed ones

    @property
    def _num_blocks(self) -> int:
        return len(self.sink_blocks) + self.num_freed + len(self.blocks)

    def missing(self, num_tokens: int) -> int:
        """Number of blocks to add so that positions below `num_tokens` have a block."""
        return max(0, self.layout.blocks_for(num_tokens) - self._num_blocks)

    def capacity_with(self, num_blocks: int) -> int:
        """The capacity with `num_blocks` more."""
        return self.layout.capacity(self._num_blocks + num_blocks)

    def add(self, blocks: list[int]) -> None:
        sinks = self.layout.num_sink_blocks - len(self.sink_blocks)
        self.sink_blocks += blocks[:sinks]
        self.blocks += blocks[sinks:]
        self.capacity = self.capacity_with(0)
        self.changes += 1

    def start_after(self, sink_blocks: Iterable[int], num_freed: int, blocks: Iterable[int]) -> None:
        """Initialise the table with a cached prefix, of which some blocks are not visible any more."""
        self.sink_blocks, self.num_freed, self.blocks = list(sink_blocks), num_freed, list(blocks)
        self.capacity = self.capacity_with(0)
        self.changes += 1

    def block(self, number: int) -> int:
        """The id of live block `number` of the sequence."""
        sinks = self.layout.num_sink_blocks
        return self.sink_blocks[number] if number < sinks else self.blocks[number - sinks - self.num_freed]

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
        """Remove and return the blocks that neither the query at `next_position` nor a later one sees."""
        dead = min(self.layout.num_unseen_blocks(next_position) - self.num_freed, len(self.blocks))
        if dead <= 0:
            return []
        freed = self.blocks[:dead]
        del self.blocks[:dead]
        self.num_freed += dead
        self.changes += 1
        return freed

    def pop_after(self, num_tokens: int) -> list[int]:
        """Remove and return the blocks without positions below `num_tokens`, last positions first."""
        num_blocks = self.layout.blocks_for(num_tokens)
        kept = max(0, num_blocks - self.layout.num_sink_blocks - self.num_freed)
        popped = self.blocks[kept:][::-1] + self.sink_blocks[num_blocks:][::-1]
        del self.blocks[kept:], self.sink_blocks[num_blocks:]
        self.capacity = self.capacity_with(0)
        self._num_told = min(self._num_told, self.num_freed + len(self.blocks))
        self._num_told_sinks = min(self._num_told_sinks, len(self.sink_blocks))
        self.changes += 1
        return popped

    def pop_all(self) -> list[int]:
        """Remove and return every block, last positions first and sinks last; the table is as new."""
        blocks = self.blocks[::-1] + self.sink_blocks[::-1]
        self.sink_blocks, self.blocks, self.num_freed, self.capacity = [], [], 0, 0
        self.generation += 1
        self.changes += 1
        return blocks

    def take_untold(self) -> tuple[int, list[int], int, list[int], int]:
        """Blocks added since the last call: number of the first sink block, sink blocks, number of the first other
        block, other blocks; and `num_freed`."""
        first_sink, first = self._num_told_sinks, max(self._num_told, self.num_freed)
        self._num_told_sinks, self._num_told = len(self.sink_blocks), self.num_freed + len(self.blocks)
        return first_sink, self.sink_blocks[first_sink:], first, self.blocks[first - self.num_freed :], self.num_freed

    def forget_told(self) -> None:
        """Let the next `take_untold` return all blocks."""
        self._num_told_sinks = self._num_told = 0
