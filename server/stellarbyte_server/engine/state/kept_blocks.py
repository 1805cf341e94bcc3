"""The prefix cache of sequences: gives full blocks their keys, finds them, frees invisible ones."""

from stellarbyte_server.engine.state.block_pool import BlockPool, CacheLayout
from stellarbyte_server.engine.state.cache_log import BlockOrigin, StoredBlock
from stellarbyte_server.engine.state.prefix_cache import NOTHING_CACHED, BlockKeys, CachedPrefix, find_prefix
from stellarbyte_server.engine.state.sequence import Sequence


class KeptBlocks:
    """The blocks of all sequences by content. `num_evicted` counts evicted tokens; for running requests up to their
    last full block."""

    def __init__(self, layout: CacheLayout, pool: BlockPool, *, prefix_caching: bool) -> None:
        self.prefix_caching = prefix_caching
        self.num_evicted = 0
        self._layout = layout
        self._pool = pool

    def find(self, sequence: Sequence) -> CachedPrefix:
        """The cached prefix of a sequence, without its last token, which must be computed to get the next one."""
        if not self.prefix_caching or not sequence.reads_cache:
            return NOTHING_CACHED
        return find_prefix(self.prompt_keys(sequence), self._layout, self._pool)

    def prompt_keys(self, sequence: Sequence) -> list[bytes]:
        """The keys of the full blocks of a sequence without its last token."""
        return self._keys(sequence, len(sequence.tokens) - 1)

    def settle(self, sequence: Sequence) -> None:
        """Give new full blocks their keys; free the blocks that are invisible from the end of the last full one.

        Counted from there, and not from the newest token, a sequence always keeps a window that ends with a whole
        block, where a continuation can start. Blocks of an answer lose their keys when freed, since a continuation
        needs only the last window: so an endless stream reuses the same few blocks. Blocks of prompts keep theirs, for
        other requests with the same beginning.
        """
        layout, table = self._layout, sequence.table
        self.count_evicted(sequence)
        keys = self._keys(sequence, sequence.num_computed) if self.prefix_caching else []
        while sequence.next_full_at <= sequence.num_computed:
            if self.prefix_caching:
                block = table.block(sequence.num_full)
                if self.name(sequence, sequence.num_full, block) and self._pool.tiers is not None:
                    self._pool.tiers.store(keys[sequence.num_full], block)
            last_end = sequence.next_full_at
            sequence.num_full += 1
            sequence.next_full_at = layout.block_end(sequence.num_full)
        first = layout.num_sink_blocks + table.num_freed
        for number, block in enumerate(table.pop_unseen(last_end), first):
            self._pool.give_back((block,), keep_content=layout.block_end(number) <= sequence.num_prompt)

    def name(self, sequence: Sequence, number: int, block: int) -> bool:
        """Let `block`, which has the content of block `number` of a sequence, be found; False if another one is."""
        assert sequence.keys is not None
        keys = sequence.keys.keys
        if not self._pool.name(block, keys[number]):
            return False
        if self._pool.log is not None:
            self._pool.log.add(self._stored(sequence, number, keys))
        return True

    def live_keys(self, sequence: Sequence) -> list[bytes]:
        """The keys of a sequence's full blocks in its table, last positions first and sinks last."""
        if sequence.keys is None or not self.prefix_caching:
            return []
        num_sinks, keys = self._layout.num_sink_blocks, sequence.keys.keys
        num_full = min(sequence.num_full, len(keys))
        first = num_sinks + sequence.table.num_freed
        return keys[first:num_full][::-1] + keys[: min(num_sinks, num_full)][::-1]

    def _stored(self, sequence: Sequence, number: int, keys: list[bytes]) -> StoredBlock:
        """What is logged of block `number` of a sequence."""
        start, parent = (self._layout.block_end(number - 1), keys[number - 1]) if number else (0, None)
        adapter, request, stop = sequence.adapter, sequence.request, self._layout.block_end(number)
        adapter_start = sequence.adapter_start
        is_adapted = adapter is not None and adapter_start is not None and adapter_start < stop
        origin = BlockOrigin(
            adapter=adapter.name if adapter is not None and is_adapted else None,
            adapter_hash=adapter.content_hash if adapter is not None and is_adapted else "",
            adapter_scale=request.adapter_scale if is_adapted else 1.0,
            salt=request.cache_salt,
            adapter_start=adapter_start if adapter is not None and is_adapted and adapter.invocation else None,
        )
        return StoredBlock(keys[number], parent, sequence.tokens[start:stop], origin)

    def rewind(self, sequence: Sequence, count: int) -> bool:
        """Undo a sequence's last `count` tokens and free the blocks that are then unused.

        A block that it will write again loses its key; if it has other holders, its tokens are recomputed in another
        block. False if blocks of the next token's window were freed, so that the sequence cannot continue from there.
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
        """Whether all blocks that the next query sees are held."""
        return sequence.table.num_freed <= self._layout.num_unseen_blocks(sequence.num_computed)

    def count_evicted(self, sequence: Sequence) -> None:
        """Count tokens evicted since the last call; tokens that a preempted sequence recomputes count once."""
        evicted = max(sequence.num_evicted, self._layout.evicted_tokens(sequence.num_computed + 1))
        self.num_evicted += evicted - sequence.num_evicted
        sequence.num_evicted = evicted

    def _keys(self, sequence: Sequence, num_tokens: int) -> list[bytes]:
        """The keys of the blocks that a sequence's first tokens fill."""
        if sequence.keys is None:
            sequence.keys = block_keys(self._layout, sequence)
        sequence.keys.extend(sequence.tokens, num_tokens)
        return sequence.keys.keys


def block_keys(layout: CacheLayout, sequence: Sequence) -> BlockKeys:
    """The keys of a sequence's blocks, by all that their content depends on besides tokens.

    Blocks before an activated adapter's first token are those of the model alone.
    """
    adapter, salt = sequence.adapter, sequence.request.cache_salt
    used = None if adapter is None else (adapter.content_hash, sequence.request.adapter_scale)
    if adapter is None or not adapter.invocation:
        return BlockKeys(layout, repr((used, salt)).encode())
    start = sequence.adapter_start
    later = None if start is None else (start, repr((used, start)).encode())
    return BlockKeys(layout, repr((None, salt)).encode(), later)
