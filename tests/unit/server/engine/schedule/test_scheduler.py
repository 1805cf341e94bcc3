"""Scheduling decisions, without a model: nobody waits for ever, no block is lost or wrongly shared."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stellarbyte_server.engine.schedule.scheduler import Scheduler
from stellarbyte_server.engine.schedule.waiting import AGEING_S
from stellarbyte_server.engine.state.account import Account
from stellarbyte_server.engine.state.block_pool import CacheLayout
from stellarbyte_server.engine.state.sequence import Chunk, Sequence
from stellarbyte_server.protocol.request import RequestRejected
from tests.support.engines.engine import generated, is_complete, make_request, make_scheduler
from tests.support.engines.symbolic_cache import SymbolicRunner, continuation


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def run_step(scheduler: Scheduler, runner: SymbolicRunner | None = None) -> tuple[list[Chunk], list[Sequence]]:
    """One step; its chunks and the sequences that ended. Without a runner the sampled tokens are all 1."""
    chunks = scheduler.schedule()
    sampled = [[1] * chunk.samples for chunk in chunks] if runner is None else runner.run(chunks)
    ended = [sequence for sequence, _ in scheduler.apply(chunks, sampled) if is_complete(sequence)]
    for sequence in ended:
        scheduler.remove(sequence)
    return chunks, ended


def check_blocks(scheduler: Scheduler) -> None:
    """The pool's count of blocks in use is exactly what the tables of running sequences hold."""
    held = {block for s in scheduler.running for block, _ in s.table.entries()}
    assert len(held) == scheduler.pool.num_used
    assert not any(s.table.entries() for s in scheduler.waiting)


@st.composite
def traffic(draw):
    """Requests in order of arrival: (step, request, step of its abort or None, account). Prompts often begin alike."""
    requests = []
    for number in range(draw(st.integers(0, 12))):
        prompt = [draw(st.integers(0, 1))] * draw(st.integers(1, 60))
        prompt[-1] = draw(st.integers(0, 2))
        request = make_request(
            prompt,
            max_tokens=draw(st.integers(1, 30)),
            request_id=str(number),
            priority=draw(st.integers(-2, 2)),
            cache_salt=draw(st.sampled_from(["", "a"])),
        )
        step = draw(st.integers(0, 20))
        requests.append((step, request, draw(st.none() | st.integers(step, 60)), draw(st.integers(0, 2))))
    return sorted(requests, key=lambda item: item[0])


@settings(max_examples=3 * settings().max_examples, deadline=None)
@given(
    requests=traffic(),
    window=st.none() | st.integers(1, 20),
    sink_tokens=st.integers(0, 6),
    block_size=st.integers(1, 9),
    budget=st.integers(1, 40),
    prefill_budget=st.none() | st.integers(1, 20),
    max_num_seqs=st.integers(1, 6),
    spare_blocks=st.integers(0, 10),
    timeout_s=st.none() | st.integers(0, 40),
    prefix_caching=st.booleans(),
)
def test_random_traffic(
    requests,
    window,
    sink_tokens,
    block_size,
    budget,
    prefill_budget,
    max_num_seqs,
    spare_blocks,
    timeout_s,
    prefix_caching,
) -> None:
    """Every request ends once: with the tokens it must get, or aborted, or expired before it ever ran."""
    layout = CacheLayout(block_size=block_size, window=window, sink_tokens=sink_tokens if window else 0)
    clock, runner = Clock(), SymbolicRunner(layout)
    scheduler = make_scheduler(
        num_blocks=layout.peak_blocks(90, 1) + spare_blocks,
        block_size=block_size,
        window=window,
        sink_tokens=layout.sink_tokens,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_prefill_tokens=prefill_budget,
        max_model_len=90,
        queue_timeout_s=timeout_s,
        prefix_caching=prefix_caching,
        clock=clock,
    )
    arriving, live, admitted, order = list(requests), {}, [], []
    accounts = [Account(f"key-{number}") for number in range(3)]
    for step in range(5000):
        clock.now_s = step * 1.0
        while arriving and arriving[0][0] == step:
            _, request, abort_step, account = arriving.pop(0)
            order.append(scheduler.add(request, account=accounts[account]))
            live[order[-1]] = abort_step
        for sequence in [sequence for sequence, abort_step in live.items() if abort_step == step]:
            scheduler.remove(sequence)
            del live[sequence]
        preemptions = scheduler.totals.num_preemptions
        chunks, ended = run_step(scheduler, runner)
        assert bool(chunks) == bool(live) or scheduler.totals.num_preemptions > preemptions
        for sequence in scheduler.expire():
            assert clock.now_s - sequence.arrived_s > timeout_s and not sequence.was_admitted
            del live[sequence]
        assert sum(chunk.length for chunk in chunks) <= budget
        assert all(chunk.length > 0 for chunk in chunks)
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        assert len(scheduler.running) <= max_num_seqs
        admitted += scheduler.admitted
        for sequence in ended:
            del live[sequence]
            assert generated(sequence) == continuation(sequence.request)
        check_blocks(scheduler)
        if not arriving and not scheduler.has_work:
            break
    assert not live and not arriving
    assert scheduler.pool.num_used == 0
    alike: dict[tuple[Account, int, int], list[int]] = {}
    for sequence in admitted:
        alike.setdefault((sequence.account, sequence.request.priority, sequence.num_prompt), []).append(
            order.index(sequence)
        )
    for numbers in alike.values():  # of one account, as important and as long: first come, first served
        assert numbers == sorted(numbers)


def test_prompts_take_few_tokens_while_others_generate() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=40, max_prefill_tokens=8, prefix_caching=False)
    scheduler.add(make_request([0] * 30, max_tokens=3, request_id="first"))
    assert [chunk.length for chunk in run_step(scheduler)[0]] == [30]  # nobody waits for a token
    scheduler.add(make_request([0] * 30, request_id="long"))
    scheduler.add(make_request([0] * 5, request_id="short"))
    steps = [[(c.sequence.request.request_id, c.length) for c in run_step(scheduler)[0]] for _ in range(3)]
    assert steps == [
        [("first", 1), ("long", 4), ("short", 4)],
        [("first", 1), ("short", 1), ("long", 8)],
        [("short", 1), ("long", 8)],
    ]


def test_decodes_go_before_prefill_and_prompts_come_in_chunks() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8, prefix_caching=False)
    scheduler.add(make_request([0] * 4, max_tokens=5, request_id="first"))
    run_step(scheduler)
    scheduler.add(make_request([0] * 20, max_tokens=5, request_id="long", priority=-1))
    scheduler.add(make_request([0] * 20, max_tokens=5, request_id="later"))
    steps = [[(c.sequence.request.request_id, c.length) for c in run_step(scheduler)[0]] for _ in range(3)]
    assert steps == [
        [("first", 1), ("long", 7)],
        [("first", 1), ("long", 7)],
        [("first", 1), ("long", 6), ("later", 1)],
    ]


def test_the_youngest_is_preempted_and_the_oldest_runs_on() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    old = scheduler.add(make_request([0] * 8, max_tokens=10, request_id="old", cache_salt="a"))
    young = scheduler.add(make_request([0] * 8, max_tokens=10, request_id="young"))
    while not scheduler.totals.num_preemptions:
        run_step(scheduler)
    assert scheduler.running == [old] and list(scheduler.waiting) == [young]
    assert young.num_computed == 0 and young.num_generated > 0  # what it generated is kept


def test_what_is_less_important_is_preempted_first_however_old() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    old = scheduler.add(make_request([0] * 8, max_tokens=10, request_id="old", cache_salt="a", priority=1))
    young = scheduler.add(make_request([0] * 8, max_tokens=10, request_id="young"))
    while not scheduler.totals.num_preemptions:
        run_step(scheduler)
    assert scheduler.running == [young] and list(scheduler.waiting) == [old]


def test_a_preempted_sequence_comes_back_from_what_the_cache_still_holds() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    scheduler.add(make_request([0] * 8, max_tokens=6, request_id="old", cache_salt="a"))
    young = scheduler.add(make_request([0] * 9, max_tokens=6, request_id="young"))
    while not scheduler.totals.num_preemptions:
        run_step(scheduler)
    again: list[Chunk] = []
    while not again:
        again = [chunk for chunk in run_step(scheduler)[0] if chunk.sequence is young]
    assert again[0].start >= 4, "its blocks were free, and not all were taken meanwhile"


def test_lower_priorities_run_first() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for priority in (1, 0, 2, -1):
        scheduler.add(make_request([0], max_tokens=1, request_id=str(priority), priority=priority))
    order = []
    while scheduler.has_work:
        order += [chunk.sequence.request.priority for chunk in run_step(scheduler)[0]]
    assert order == [-1, 0, 1, 2]


def test_a_steady_flow_of_important_requests_starves_nobody() -> None:
    clock = Clock()
    scheduler = make_scheduler(max_num_seqs=1, clock=clock)
    patient = scheduler.add(make_request([0], max_tokens=1, request_id="patient", priority=3))
    for second in range(1000):
        clock.now_s = float(second)
        scheduler.add(make_request([0], max_tokens=1, request_id=str(second)))
        if patient in run_step(scheduler)[1]:
            break
    assert clock.now_s == pytest.approx(3 * AGEING_S, abs=1)


def test_a_request_longer_than_the_context_is_refused_unless_it_slides() -> None:
    scheduler = make_scheduler(max_model_len=50, window=46, sink_tokens=4)
    with pytest.raises(RequestRejected, match=r"40 tokens and max_tokens is 11.*50 tokens") as caught:
        scheduler.add(make_request([0] * 40, max_tokens=11))
    assert caught.value.code == "context_length_exceeded"
    assert not scheduler.has_work
    scheduler.add(make_request([0] * 40, max_tokens=11, context_overflow="slide"))


def test_a_full_queue_refuses_until_a_request_ends() -> None:
    scheduler = make_scheduler(max_num_seqs=2, max_queued_requests=3)
    first, *_ = [scheduler.add(make_request([0], max_tokens=9, request_id=str(i))) for i in range(5)]
    with pytest.raises(RequestRejected, match="try again later") as caught:
        scheduler.add(make_request([0]))
    assert caught.value.code == "queue_full"
    run_step(scheduler)
    scheduler.remove(first)
    scheduler.add(make_request([0]))


def test_the_time_out_is_for_the_first_step_only() -> None:
    """A request that was preempted has begun its answer: it may wait as long as it must."""
    clock = Clock()
    scheduler = make_scheduler(num_blocks=6, block_size=4, max_num_seqs=2, queue_timeout_s=5, clock=clock)
    for name in ("old", "young"):
        scheduler.add(make_request([0] * 8, max_tokens=16, request_id=name, cache_salt=name))
    late = scheduler.add(make_request([0] * 8, request_id="late"))
    while not scheduler.totals.num_preemptions:
        run_step(scheduler)
    clock.now_s = 5.0
    assert scheduler.expire() == []
    clock.now_s = 5.1
    assert scheduler.expire() == [late]
    while scheduler.has_work:
        run_step(scheduler)
