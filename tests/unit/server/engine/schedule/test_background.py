"""Requests in the background: what others notice of them, and what they get."""

import pytest

from stellarbyte_server.engine.schedule.places import TURN_S
from stellarbyte_server.engine.state.account import Account, TokenBucket
from stellarbyte_server.engine.state.sequence import Sequence
from stellarbyte_server.protocol.request import BACKGROUND_PRIORITY, QUEUE_FULL, RequestRejected
from tests.support.engines.engine import make_request, make_scheduler
from tests.support.engines.engine_core import Script, make_core
from tests.support.engines.shared_engine import ANSWER, CPU, DEVICES, Device, World


def ask_behind(world: World, num_prompt: int, max_tokens: int, account: Account | None = None) -> Sequence:
    account = world.attacker if account is None else account
    return world.ask(account.background(), num_prompt, max_tokens, priority=BACKGROUND_PRIORITY)


def streams_behind(world: World) -> None:
    """Of one of the clients' own key: it is no better off than others."""
    for_whom = world.clients[0].account if world.clients else world.attacker
    while len(world.scheduler.waiting.of(for_whom.background())) < 3:
        ask_behind(world, 300, 300, for_whom)


@pytest.mark.parametrize(("device", "seconds"), DEVICES)
def test_others_notice_next_to_nothing(device: Device, seconds: float) -> None:
    alone = World(device, num_clients=3).run(seconds)
    beside = World(device, streams_behind, num_clients=3).run(seconds)
    assert beside.rate >= 0.8 * alone.rate
    assert beside.first_token_s <= 1.5 * alone.first_token_s


def test_without_others_they_get_everything() -> None:
    def streams(world: World) -> None:
        while len(world.scheduler.waiting.of(world.attacker)) < 3:
            world.ask(world.attacker, 300, 300)

    ordinary, behind = World(CPU, streams, num_clients=0).run(60), World(CPU, streams_behind, num_clients=0).run(60)
    assert sum(behind.step_tokens) >= 0.9 * sum(ordinary.step_tokens)


def test_a_newcomer_takes_the_place_of_one_in_the_background_at_once_and_never_the_other_way() -> None:
    world = World(CPU, num_clients=0, max_num_seqs=2)
    behind = [ask_behind(world, 10, 1000) for _ in range(2)]
    world.step()
    assert [sequence.is_running for sequence in behind] == [True, True]
    newcomer = world.ask(world.attacker, 10, 1000)
    world.step()
    assert newcomer.is_running and sum(sequence.is_running for sequence in behind) == 1
    second = world.ask(Account("another"), 10, 1000)
    world.step()
    assert second.is_running and not any(sequence.is_running for sequence in behind)
    world.now_s += 2 * TURN_S
    for _ in range(100):
        world.step()
    assert newcomer.is_running and second.is_running


def test_when_blocks_run_out_those_in_the_background_go_first() -> None:
    world = World(CPU, num_clients=0, num_blocks=20, block_size=16, window=100)
    behind = ask_behind(world, 100, 200)
    world.step()
    ordinary = [world.ask(Account(name), 60, 200, context_overflow="slide") for name in ("a", "b")]
    for _ in range(60):
        world.step()
        assert all(sequence.is_running for sequence in ordinary[:1])
    assert not behind.is_running and all(sequence.is_running for sequence in ordinary)


def test_a_full_queue_has_room_for_all_but_them() -> None:
    scheduler = make_scheduler(max_num_seqs=1, max_queued_requests=1)
    account = Account("key")
    behind = [scheduler.add(make_request([1], 5, str(i)), account=account.background()) for i in range(2)]
    scheduler.add(make_request([1], 5, "ordinary"), account=account)
    assert scheduler.take_displaced() == [behind[1]]
    with pytest.raises(RequestRejected) as refused:
        scheduler.add(make_request([1], 5, "again"), account=account.background())
    assert refused.value.code == QUEUE_FULL


def test_they_wait_longer_than_the_queues_time_out() -> None:
    now_s = 0.0
    scheduler = make_scheduler(max_num_seqs=1, queue_timeout_s=5.0, clock=lambda: now_s)
    account = Account("key")
    scheduler.add(make_request([1], 5, "behind"), account=account.background())
    ordinary = scheduler.add(make_request([1], 5, "ordinary"), account=account)
    now_s = 100.0
    assert scheduler.expire() == [ordinary]


def test_a_key_pays_for_them() -> None:
    account = Account("key", TokenBucket(60))
    assert account.background().bucket is account.bucket
    account.bucket = TokenBucket(120)
    assert account.background().bucket is account.bucket


def test_the_engine_puts_requests_of_that_priority_behind_all_others() -> None:
    core = make_core(Script("ab"), max_num_seqs=1)
    core.submit(make_request([1], 2, "behind", priority=BACKGROUND_PRIORITY))
    core.submit(make_request([1], 2, "ordinary"))
    order = []
    while core.has_work:
        order += [item.request_id for item in core.step() if getattr(item, "finish_reason", None)]
    assert order == ["ordinary", "behind"]


def test_answers_in_the_background_are_whole_after_all_interruptions() -> None:
    world = World(CPU, num_clients=3, max_num_seqs=3)
    behind = ask_behind(world, 20, ANSWER)
    world.run(20)
    world.clients = []
    for _ in range(400):
        world.step()
    assert behind.is_over and behind.num_generated == ANSWER
