"""Blocks of waiting sequences on their way from lower tiers into the pool. Decisions over counts.

A sequence whose prefix goes on in a lower tier waits until its blocks are filled; then it finds them in the pool, like
any others. Each sequence looks once for each time that it is queued, so blocks that are evicted again are computed.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from stellarbyte_server.engine.state.block_pool import BlockPool, CacheLayout
from stellarbyte_server.engine.state.kept_blocks import KeptBlocks
from stellarbyte_server.engine.state.lower_tiers import BlockLoad, LowerTiers
from stellarbyte_server.engine.state.prefix_cache import CachedPrefix, find_prefix
from stellarbyte_server.engine.state.sequence import Sequence

_BELOW = -1  # in place of a block's id: its content is in a lower tier


@dataclass(frozen=True, kw_only=True)
class _Anywhere:
    """Blocks of the pool and of lower tiers."""

    pool: BlockPool
    tiers: LowerTiers

    def find(self, key: bytes) -> int | None:
        block = self.pool.find(key)
        return _BELOW if block is None and self.tiers.has(key) else block


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    """For which sequence blocks are loaded."""

    sequence: Sequence
    numbers: dict[bytes, int]  # key → number of the block in the sequence
    held: tuple[int, ...]  # blocks of its prefix that are in the pool already


class Loading:
    """Engine thread only."""

    def __init__(self, layout: CacheLayout, pool: BlockPool, kept: KeptBlocks, tiers: LowerTiers) -> None:
        self.num_queried_tokens = 0  # tokens of sequences that were looked up below, beyond what the pool had
        self.num_loaded_tokens = 0  # of these, tokens in blocks that were filled
        self._layout = layout
        self._pool = pool
        self._kept = kept
        self._tiers = tiers
        self._waiting: dict[BlockLoad, _Waiting] = {}  # oldest first

    def __len__(self) -> int:
        """Number of loads."""
        return len(self._waiting)

    def begin(self, sequence: Sequence, cached: CachedPrefix) -> bool:
        """Load what a waiting sequence's prefix has in lower tiers beyond `cached`; False if it need not wait.

        There must be free blocks for its tokens.
        """
        if sequence.has_looked_below or not sequence.reads_cache or not self._kept.prefix_caching:
            return False
        sequence.has_looked_below = True
        keys = self._kept.prompt_keys(sequence)
        self.num_queried_tokens += len(sequence.tokens) - cached.num_tokens
        found = find_prefix(keys, self._layout, _Anywhere(pool=self._pool, tiers=self._tiers))
        if found.num_tokens <= cached.num_tokens:
            return False
        num_sinks = len(found.sink_blocks)
        numbered = [*enumerate(found.sink_blocks), *enumerate(found.blocks, num_sinks + found.num_unseen)]
        numbers = {keys[number]: number for number, block in numbered if block == _BELOW}
        held = tuple(block for _, block in numbered if block != _BELOW)
        self._pool.hold(held)
        blocks = self._pool.take(len(numbers))
        if blocks is None:
            self._pool.give_back(held)
            return False
        sequence.load = load = BlockLoad(zip(numbers, blocks, strict=True))
        self._waiting[load] = _Waiting(sequence=sequence, numbers=numbers, held=held)
        self._tiers.load(load)
        return True

    def settle(self) -> None:
        """Let the sequences of ended loads find their blocks."""
        for load in self._tiers.take_ended():
            waiting = self._waiting.pop(load)
            self._take_done(load, waiting)
            self._pool.give_back(waiting.held[::-1])
            if waiting.sequence.load is load:
                waiting.sequence.load = None

    def give_up(self) -> bool:
        """Free the blocks of the newest load with any that no thread is filling; False if there is none."""
        for load, waiting in reversed(self._waiting.items()):
            if self._cut(load) + self._take_done(load, waiting):
                return True
        return False

    def drop(self, sequence: Sequence) -> None:
        """Stop the load of a sequence that does not wait any more."""
        if sequence.load is not None:
            self._cut(sequence.load)

    def touch(self, sequence: Sequence) -> None:
        """Note the use of a sequence's blocks, so that its first ones are kept longest."""
        self._tiers.touch(self._kept.live_keys(sequence))

    def _cut(self, load: BlockLoad) -> int:
        """Free the blocks that are not begun; returns their number."""
        num_freed = 0
        while True:
            try:
                _, block = load.pending.pop()
            except IndexError:  # the other thread takes from it, too
                return num_freed
            self._pool.give_back((block,))
            num_freed += 1

    def _take_done(self, load: BlockLoad, waiting: _Waiting) -> int:
        """Name and free the blocks that are done, last positions first; returns their number."""
        done = [load.done.popleft() for _ in range(len(load.done))]
        for key, block, is_filled in done:
            if is_filled and key not in load.discarded:
                number = waiting.numbers[key]
                self._kept.name(waiting.sequence, number, block)
                start = self._layout.block_end(number - 1) if number else 0
                self.num_loaded_tokens += self._layout.block_end(number) - start
        self._pool.give_back(_blocks(reversed(done)))
        return len(done)


def _blocks(done: Iterable[tuple[bytes, int, bool]]) -> list[int]:
    return [block for _, block, _ in done]
