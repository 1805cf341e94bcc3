"""What the cache keeps of sequences: names full blocks, finds them again, frees those that are out of sight."""

from stellarbyte_server.engine.state.block_pool import BlockPool, CacheLayout
from stellarbyte_server.engine.state.prefix_cache import NOTHING_CACHED, BlockKeys, CachedPrefix, find_prefix
from stellarbyte_server.engine.state.sequence import Sequence


class KeptBlocks:
    """The blocks of all sequences by content. `num_evicted` counts computed tokens that have gone out of sight, of
    running requests as far as blocks are full."""

    def __init__(self, layout: CacheLayout, pool: BlockPool, *, prefix_caching: bool) -> None:
        self.prefix_caching = prefix_caching
        self.num_evicted = 0
        self._layout = layout
        self._pool = pool

    def find(self, sequence: Sequence) -> CachedPrefix:
        """What the cache holds of a sequence; never its last token, whose computation yields the next one."""
        if not self.prefix_caching or not sequence.reads_cache:
            return NOTHING_CACHED
        return find_prefix(self._keys(sequence, len(sequence.tokens) - 1), self._layout, self._pool)

    def settle(self, sequence: Sequence) -> None:
        """Name the blocks that have become full; free those that are out of sight from the end of the last full one.

        Freed from there and not from the newest token on, a sequence always leaves a window that ends with a whole
        block, which is where its continuation can start. A stream's own tokens are forgotten with their block, since
        a continuation needs the last window only: so an endless stream uses the same few blocks over and over.
        Prompts are kept: others may begin like them.
        """
        layout, table = self._layout, sequence.table
        self.count_evicted(sequence)
        keys = self._keys(sequence, sequence.num_computed) if self.prefix_caching else []
        while sequence.next_full_at <= sequence.num_computed:
            if self.prefix_caching:
                self._pool.name(table.block(sequence.num_full), keys[sequence.num_full])
            last_end = sequence.next_full_at
            sequence.num_full += 1
            sequence.next_full_at = layout.block_end(sequence.num_full)
        first = layout.num_sink_blocks + table.num_freed
        for number, block in enumerate(table.pop_unseen(last_end), first):
            self._pool.give_back((block,), keep_content=layout.block_end(number) <= sequence.num_prompt)

    def rewind(self, sequence: Sequence, count: int) -> bool:
        """Take back a sequence's last `count` tokens and the blocks that are unused then.

        A block that it will write to again loses its name; where others hold it, its tokens are computed anew in
        another block. False where the window of the next token has lost blocks: it cannot go on from there.
        """
        table, last_full = sequence.table, sequence.num_full
        self._pool.give_back(sequence.rewind(count))
        if not self._holds_window(sequence):
            return False
        if sequence.num_full < last_full and table.capacity > sequence.num_computed:
            if not self._pool.unname(table.block(sequence.num_full)):
                start = self._layout.capacity(sequence.num_full)
                self._pool.give_back(sequence.compute_again(start))
        return self._holds_window(sequence)

    def _holds_window(self, sequence: Sequence) -> bool:
        """Whether no block is freed that the next query sees."""
        return sequence.table.num_freed <= self._layout.num_unseen_blocks(sequence.num_computed)

    def count_evicted(self, sequence: Sequence) -> None:
        """Add what has gone out of sight since the last time; what a preempted sequence computes again counts once."""
        evicted = max(sequence.num_evicted, self._layout.evicted_tokens(sequence.num_computed + 1))
        self.num_evicted += evicted - sequence.num_evicted
        sequence.num_evicted = evicted

    def _keys(self, sequence: Sequence, num_tokens: int) -> list[bytes]:
        """The keys of the blocks that a sequence's first tokens fill."""
        if sequence.keys is None:
            sequence.keys = BlockKeys(self._layout, salt_of(sequence))
        sequence.keys.extend(sequence.tokens, num_tokens)
        return sequence.keys.keys


def salt_of(sequence: Sequence) -> bytes:
    """What two sequences must have in common, beside their tokens, to share content of the cache."""
    adapter = None if sequence.adapter is None else (sequence.adapter.content_hash, sequence.request.adapter_scale)
    return repr((adapter, sequence.request.cache_salt)).encode()
