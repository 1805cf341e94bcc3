"""Blocks: which are taken first, what a table keeps in sight."""

from hypothesis import given
from hypothesis import strategies as st

from stellarbyte_server.engine.state.block_pool import BlockPool, BlockTable, CacheLayout


@given(
    block_size=st.integers(1, 9),
    window=st.none() | st.integers(1, 30),
    sink_tokens=st.integers(0, 12),
    steps=st.lists(st.integers(1, 15), min_size=1, max_size=30),
)
def test_block_table_keeps_exactly_what_later_queries_see(block_size, window, sink_tokens, steps) -> None:
    layout = CacheLayout(block_size=block_size, window=window, sink_tokens=sink_tokens if window else 0)
    table = BlockTable(layout)
    fresh = iter(range(10_000))
    owner: dict[int, tuple[int, int]] = {}  # position -> slot it was written to
    computed = 0
    for length in steps:
        table.add([next(fresh) for _ in range(table.missing(computed + length))])
        assert table.capacity >= computed + length
        for position in range(computed, computed + length):
            owner[position] = table.locate(position)
        computed += length
        assert len(table.entries()) <= layout.peak_blocks(computed, max(steps))
        live = dict(table.entries())
        for position in range(computed):
            seen = window is None or position > computed - 1 - window or position < layout.sink_tokens
            if seen:  # by the step's last query
                block, offset = owner[position]
                assert live[block] + offset == position
        freed = table.pop_unseen(computed)
        for block in freed:
            written = [position for position, slot in owner.items() if slot[0] == block]
            assert window is not None and max(written) <= computed - window
        if window is not None:
            assert len(table.entries()) <= layout.steady_blocks
    assert len(set(owner.values())) == len(owner)


def test_free_blocks_keep_their_content_until_no_blank_one_is_left() -> None:
    pool = BlockPool(4)
    old, new = pool.take(2) or []
    pool.name(old, b"old")
    pool.name(new, b"new")
    pool.give_back([old])
    pool.give_back([new])
    assert pool.num_free == 4
    pool.take(2)
    assert (pool.find(b"old"), pool.find(b"new")) == (old, new)
    assert pool.take(1) == [old], "the one that has been free the longest goes first"
    assert (pool.find(b"old"), pool.find(b"new")) == (None, new)


def test_a_shared_block_is_free_when_its_last_holder_leaves() -> None:
    pool = BlockPool(2)
    (block,) = pool.take(1) or []
    pool.name(block, b"key")
    pool.hold([block])
    pool.give_back([block], keep_content=False)
    assert (pool.num_used, pool.find(b"key")) == (1, block), "another one still wants its content"
    pool.give_back([block])
    pool.hold([block])
    assert pool.num_used == 1
    pool.give_back([block], keep_content=False)
    assert (pool.num_used, pool.find(b"key")) == (0, None)


def test_two_blocks_with_the_same_content_have_one_key() -> None:
    pool = BlockPool(2)
    first, second = pool.take(2) or []
    pool.name(first, b"key")
    pool.name(second, b"key")
    pool.give_back([second])
    assert pool.find(b"key") == first
    pool.give_back([first])
    assert pool.num_free == 2
