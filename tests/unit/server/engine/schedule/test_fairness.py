"""What one key gets beside another that asks for everything: the real scheduler under a clock that its steps move.

A step takes as long as it does on two cores (or on a GPU), so that rates and waiting times can be compared with those
among keys that all ask for the same. Nothing here is timed.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stellarbyte_server.engine.schedule.places import TURN_TOKENS
from stellarbyte_server.engine.schedule.shares import max_min
from stellarbyte_server.engine.state.account import Account, TokenBucket
from stellarbyte_server.engine.state.sequence import Chunk
from stellarbyte_server.protocol.request import RequestRejected
from tests.support.engines.engine import make_request, make_scheduler
from tests.support.engines.shared_engine import CPU, DEVICES, Device, World


def endless_streams(world: World) -> None:
    while world.num_asked < 100:
        world.ask(world.attacker, 10, 10**9, context_overflow="slide")


def long_prompts(world: World) -> None:
    while len(world.scheduler.waiting.of(world.attacker)) < 3:
        world.ask(world.attacker, 3000, 10)


def a_full_queue(world: World) -> None:
    while True:
        try:
            world.ask(world.attacker, 50, 200)
        except RequestRejected:
            return


ATTACKS = [endless_streams, long_prompts, a_full_queue]


@pytest.mark.parametrize(("device", "seconds"), DEVICES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attacker_takes_little_more_than_its_share(device: Device, seconds: float, attack) -> None:
    equal_shares = World(device, num_clients=4).run(seconds)
    attacked = World(device, attack, window=3200, max_queued_requests=200).run(seconds)
    assert attacked.rate >= 0.5 * equal_shares.rate
    assert attacked.first_token_s <= 3 * equal_shares.first_token_s
    assert attacked.num_tokens_of_attacker / attacked.now_s >= equal_shares.rate, "it has its share, too"


@pytest.mark.parametrize(("device", "seconds"), DEVICES)
def test_sharing_costs_at_most_half_of_the_throughput(device: Device, seconds: float) -> None:
    """Of what 32 streams of one key get: fewer rows in a step, but the step is shorter."""
    alone = World(device, endless_streams, num_clients=0, window=3200).run(seconds)
    beside = World(device, endless_streams, num_clients=1, window=3200).run(seconds)
    assert sum(beside.step_tokens) / beside.now_s >= 0.5 * sum(alone.step_tokens) / alone.now_s


def test_a_stream_over_its_keys_rate_is_slowed_and_not_cut() -> None:
    world = World(CPU)
    slow = Account("slow", TokenBucket(60))
    stream = world.ask(slow, 10, 10**9, context_overflow="slide")
    slow.bucket.take(10, world.now_s)
    world.run(120)
    assert stream.is_running
    assert stream.num_generated == pytest.approx(50 + 120, abs=2)


def test_when_all_are_over_their_rates_the_engine_waits_for_the_first_and_is_not_stalled() -> None:
    world = World(CPU, num_clients=0)
    slow = Account("slow", TokenBucket(6))
    world.ask(slow, 1, 100)
    slow.bucket.take(6, world.now_s)
    assert world.scheduler.schedule() == [Chunk(world.scheduler.running[0], 0, 1, True)], "its prompt was paid for"
    world.scheduler.apply([Chunk(world.scheduler.running[0], 0, 1, True)], [[1]])
    assert world.scheduler.schedule() == [] and world.scheduler.num_blocked == 1
    wait_s = world.scheduler.seconds_until_allowed()
    assert wait_s == pytest.approx(10)
    world.now_s += wait_s
    assert len(world.scheduler.schedule()) == 1


def test_keys_get_the_only_place_by_turns() -> None:
    """Each has an endless stream; nobody waits much longer than the others' turns."""
    world = World(CPU, num_clients=0, max_num_seqs=1, window=100)
    accounts = [Account(f"key-{number}") for number in range(3)]
    streams = [world.ask(account, 10, 10**9, context_overflow="slide") for account in accounts]
    world.run(120)
    generated = [stream.num_generated for stream in streams]
    assert min(generated) >= 0.5 * max(generated)


def test_endless_streams_of_one_key_let_its_other_requests_go_on() -> None:
    world = World(CPU, num_clients=0, max_num_seqs=1, window=100)
    account = Account("key")
    for _ in range(2):
        world.ask(account, 10, 10**9, context_overflow="slide")
    short = world.ask(account, 10, 5)
    world.run(2 * TURN_TOKENS * 0.0325 + 60)  # a turn of each
    assert short.is_over


def test_an_ordinary_answer_is_not_interrupted_for_the_next_request_of_its_key() -> None:
    world = World(CPU, num_clients=0, max_num_seqs=1)
    account = Account("key")
    for _ in range(10):
        world.ask(account, 10, 1000)
    world.run(120)
    assert world.scheduler.totals.num_preemptions == 0


def test_who_needs_most_of_the_cache_gets_it_in_time() -> None:
    """Small requests of others come all the time and always find room; the large one needs nearly all blocks."""
    world = World(CPU, num_blocks=70, block_size=16)
    world.run(5)
    large = world.ask(Account("large"), 1000, 20)
    world.run(60)
    assert large.is_over


def test_a_full_queue_makes_room_for_other_keys() -> None:
    scheduler = make_scheduler(max_num_seqs=1, max_queued_requests=4)
    many, few = Account("many"), Account("few")
    for number in range(5):
        scheduler.add(make_request([0], request_id=str(number)), account=many)
    scheduler.add(make_request([0], request_id="a"), account=few)
    scheduler.reserve(few)
    assert [s.request.request_id for s in scheduler.take_displaced()] == ["4", "3"], "the newest of the key with most"
    with pytest.raises(RequestRejected, match="try again later"):
        scheduler.add(make_request([0]), account=few)  # it has as many as the other would keep
    with pytest.raises(RequestRejected, match="try again later"):
        scheduler.add(make_request([0]), account=many)


def test_short_prompts_pass_a_long_one_which_takes_at_most_twice_as_long() -> None:
    """All of one key: half of the prompts' tokens are for the shortest, half for the first."""
    world = World(CPU, num_clients=0)
    account = Account("key")
    long = world.ask(account, 3000, 1)
    alone_steps = 3000 / 128
    passed = 0
    while not long.is_over:
        short = world.ask(account, 64, 1)
        world.step()
        passed += short.is_over
    assert passed > 10
    assert len(world.step_tokens) <= 2 * alone_steps + 2


def test_a_short_prompt_of_a_modest_key_is_read_at_once_beside_others_and_a_long_one_is_not() -> None:
    world = World(CPU, num_clients=0)
    for number in range(3):
        world.ask(Account(f"stream-{number}"), 10, 1000)
    world.run(1)
    newcomers = [world.ask(Account("short"), 20, 1), world.ask(Account("long"), 2000, 1)]
    began = len(world.step_tokens)
    while not newcomers[0].is_over:
        world.step()
    assert len(world.step_tokens) - began <= 2
    for _ in range(20):
        world.step()
    assert 256 <= newcomers[1].num_computed < 500, "its credit, then its part"


def test_who_used_whole_steps_alone_has_no_credit_left_when_others_come() -> None:
    world = World(CPU, num_clients=0)
    greedy = Account("greedy")
    long = world.ask(greedy, 3000, 1)
    while long.num_computed < 1000:
        world.step()
    before = long.num_computed
    for number in range(3):
        world.ask(Account(f"stream-{number}"), 10, 1000)
    for _ in range(20):
        world.step()
    assert 20 <= long.num_computed - before < 256, "its part, without the credit of one who was modest"


def test_priority_counts_among_prompts_that_run() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8, prefix_caching=False, num_blocks=200)
    scheduler.add(make_request([0] * 100, request_id="first"))
    scheduler.apply(scheduler.schedule(), [[]])
    scheduler.add(make_request([0] * 200, request_id="urgent", priority=-50))
    chunks = {chunk.sequence.request.request_id: chunk.length for chunk in scheduler.schedule()}
    assert chunks == {"urgent": 8}


@given(
    demands=st.lists(st.integers(0, 50), min_size=1, max_size=8),
    total=st.integers(0, 200),
    first=st.integers(0, 100),
)
def test_max_min_gives_nobody_more_than_who_wants_more_has(demands, total, first) -> None:
    parts = max_min(demands, total, first)
    assert sum(parts) == min(total, sum(demands))
    for part, demand in zip(parts, demands, strict=True):
        assert part <= demand
        assert part == demand or part >= max(parts) - 1
