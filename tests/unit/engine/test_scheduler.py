"""Scheduling decisions, without a model: no block lost or shared, every request ends once, budgets kept."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.block_pool import BlockTable, CacheLayout
from server.engine.request import RequestRejected
from server.engine.scheduler import Chunk, Scheduler
from tests.engine import is_complete, make_request, make_scheduler


def run_step(scheduler: Scheduler) -> list[Chunk]:
    """One step whose sampled tokens are all 1."""
    chunks = scheduler.schedule()
    for sequence, _ in scheduler.apply(chunks, [1] * sum(chunk.samples for chunk in chunks)):
        if is_complete(sequence):
            scheduler.remove(sequence)
    return chunks


def check_invariants(scheduler: Scheduler) -> None:
    held = [block for s in scheduler.running for block, _ in s.table.entries()]
    assert len(held) == len(set(held)) == scheduler.pool.num_used
    assert not any(s.table.entries() for s in scheduler.waiting)
    assert len(scheduler.running) <= scheduler.limits.max_num_seqs


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(0, 20)), max_size=12),
    aborts=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 60)), max_size=4),
    window=st.none() | st.integers(1, 20),
    sink_tokens=st.integers(0, 6),
    block_size=st.integers(1, 9),
    budget=st.integers(1, 40),
    max_num_seqs=st.integers(1, 6),
    spare_blocks=st.integers(0, 10),
)
def test_random_traffic(requests, aborts, window, sink_tokens, block_size, budget, max_num_seqs, spare_blocks) -> None:
    layout = CacheLayout(block_size=block_size, window=window, sink_tokens=sink_tokens if window else 0)
    scheduler = make_scheduler(
        num_blocks=layout.peak_blocks(90, budget) + spare_blocks,
        block_size=block_size,
        window=window,
        sink_tokens=layout.sink_tokens,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=90,
    )
    arrivals = sorted(enumerate(requests), key=lambda item: item[1][2])
    live, first_scheduled = {}, []
    for step in range(5000):
        while arrivals and arrivals[0][1][2] <= step:
            number, (prompt, answer, _) = arrivals.pop(0)
            live[number] = scheduler.add(make_request([0] * prompt, max_tokens=answer, request_id=str(number)))
        for number, when in aborts:
            if when == step and number in live and (live[number] in scheduler.running + list(scheduler.waiting)):
                scheduler.remove(live.pop(number))
        chunks = run_step(scheduler)
        assert sum(chunk.length for chunk in chunks) <= budget
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        first_scheduled += [c.sequence for c in chunks if c.start == 0 and c.sequence not in first_scheduled]
        check_invariants(scheduler)
        if not arrivals and not scheduler.has_work:
            break
    assert scheduler.pool.num_used == 0
    assert all(is_complete(sequence) and sequence.num_pending == 1 for sequence in live.values())
    order = [int(sequence.request.request_id) for sequence in first_scheduled]
    expected = [number for number, _ in sorted(enumerate(requests), key=lambda item: item[1][2]) if number in order]
    assert order == expected  # first come, first served


def test_decodes_go_before_prefill() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_request([0] * 40, max_tokens=5, request_id="long"))
    run_step(scheduler)
    scheduler.running[0].num_computed = 40  # pretend the long prompt is done
    scheduler.running[0].tokens.append(1)
    scheduler.add(make_request([0] * 40, max_tokens=5, request_id="second"))
    scheduler.pool.give_back(scheduler.running[0].table.pop_all())
    scheduler.running[0].table.add(scheduler.pool.take(10) or [])
    chunks = scheduler.schedule()
    assert [(c.sequence.request.request_id, c.length) for c in chunks] == [("long", 1), ("second", 7)]


def test_the_youngest_is_preempted_and_the_oldest_runs_on() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4, max_num_batched_tokens=64)
    old = scheduler.add(make_request([0] * 8, max_tokens=10, request_id="old"))
    young = scheduler.add(make_request([0] * 8, max_tokens=10, request_id="young"))
    while not scheduler.num_preemptions:
        run_step(scheduler)
    assert scheduler.running == [old] and list(scheduler.waiting) == [young]
    assert young.num_computed == 0 and young.num_generated > 0  # what it generated is kept and computed again


def test_a_request_that_can_never_fit_is_rejected() -> None:
    scheduler = make_scheduler(max_model_len=50)
    with pytest.raises(RequestRejected, match=r"40 tokens and max_tokens is 11.*50 tokens") as caught:
        scheduler.add(make_request([0] * 40, max_tokens=11))
    assert caught.value.code == "context_length_exceeded"
    assert not scheduler.has_work


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
    assert len(set(owner.values())) == len(owner)
