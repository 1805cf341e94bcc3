"""The choice of a replica, for any state of the replicas."""

import dataclasses
import random

from hypothesis import given
from hypothesis import strategies as st

from stellarbyte_server.client.replicas.routing import MORE_REQUESTS, MORE_SHARE, ReplicaState, RequestFacts, choose

NAMES = ("a", "b", "c", "a+b")
adapters = st.sampled_from([(), ("a",), ("b",), ("c",), ("a", "b")])
names = st.frozensets(st.sampled_from(NAMES), max_size=3)
states = st.builds(
    ReplicaState,
    num_requests=st.integers(0, 40),
    max_requests=st.sampled_from([4, 16, 64]),
    num_waiting_tokens=st.sampled_from([0, 0, 100]),
    cached_tokens=st.sampled_from([0, 0, 16, 512]),
    slots=names,
    memory=names,
)
replica_lists = st.lists(states, min_size=1, max_size=5)


def idle(**fields: object) -> ReplicaState:
    return dataclasses.replace(ReplicaState(num_requests=0, max_requests=64), **fields)  # type: ignore[arg-type]


def test_residency_comes_before_the_prefix_and_the_prefix_before_the_load() -> None:
    facts = RequestFacts(adapters=("a",))
    in_slot, in_memory = idle(slots=frozenset("a"), num_requests=2), idle(memory=frozenset("a"), num_requests=1)
    cached, free = idle(cached_tokens=512, num_requests=2), idle()
    assert choose(facts, [free, cached, in_memory, in_slot]) == 3
    assert choose(facts, [free, cached, in_memory]) == 2
    assert choose(facts, [free, cached]) == 1
    assert choose(RequestFacts(), [cached, in_slot]) == 0, "an adapter that it does not ask for does not matter"
    assert choose(facts, [idle(num_requests=1), free]) == 1
    assert choose(facts, [idle(num_waiting_tokens=100), free]) == 1
    assert choose(facts, [free, free]) == 0


def test_a_mix_is_held_where_it_has_a_slot_or_all_its_parts_are() -> None:
    facts = RequestFacts(adapters=("a", "b"))
    mixed, parts, half = idle(slots=frozenset({"a+b"})), idle(slots=frozenset("a"), memory=frozenset("b")), idle()
    half = idle(slots=frozenset("a"))
    assert choose(facts, [half, parts, mixed]) == 2
    assert choose(facts, [half, parts]) == 1


def test_the_attraction_of_an_adapter_ends_where_another_replica_idles() -> None:
    facts = RequestFacts(adapters=("a",))
    for num_requests in range(20):
        sticky = idle(slots=frozenset("a"), cached_tokens=512, num_requests=num_requests)
        assert choose(facts, [sticky, idle()]) == (0 if num_requests <= MORE_REQUESTS else 1)


def test_a_full_batch_comes_after_all_others() -> None:
    facts = RequestFacts(adapters=("a",))
    full = ReplicaState(num_requests=8, max_requests=8, slots=frozenset("a"))
    assert choose(facts, [full, ReplicaState(num_requests=7, max_requests=8)]) == 1
    assert choose(facts, [full, ReplicaState(num_requests=8, max_requests=8)]) == 0


@given(adapters, replica_lists)
def test_the_chosen_replica_is_never_far_behind_one_that_has_room(names_: tuple[str, ...], replicas) -> None:
    chosen = replicas[choose(RequestFacts(adapters=names_), replicas)]
    with_room = [replica.num_requests for replica in replicas if not replica.is_full]
    assert not (chosen.is_full and with_room)
    fewest = min(with_room or [replica.num_requests for replica in replicas])
    assert chosen.num_requests <= fewest + max(MORE_REQUESTS, fewest // MORE_SHARE)


@given(adapters, replica_lists, st.randoms(use_true_random=False))
def test_the_choice_does_not_depend_on_the_order(names_: tuple[str, ...], replicas, chance: random.Random) -> None:
    facts = RequestFacts(adapters=names_)
    shuffled = list(replicas)
    chance.shuffle(shuffled)
    chosen, other = replicas[choose(facts, replicas)], shuffled[choose(facts, shuffled)]
    assert choose(facts, replicas) == choose(facts, replicas)
    assert replicas.index(chosen) == choose(facts, replicas), "of equal ones the first"
    of_both = [
        (r.tier(facts) if names_ else 0, r.cached_tokens, r.num_requests, r.num_waiting_tokens) for r in (chosen, other)
    ]
    assert of_both[0] == of_both[1]


@given(
    st.lists(st.tuples(adapters, st.sampled_from([0, 512])), min_size=50, max_size=200),
    st.lists(st.integers(0, 3), min_size=2, max_size=4).filter(any),
)
def test_a_slow_replica_does_not_hold_the_others(requests, ended_each_time: list[int]) -> None:
    """Replicas end so many of their requests for each one that arrives; a replica with 0 ends none at all.

    Adapters stay where they were first used, so that requests for them are drawn to one replica.
    """
    open_requests = [0] * len(ended_each_time)
    slots: list[set[str]] = [set() for _ in ended_each_time]
    for names_, cached in requests:
        replicas = [
            ReplicaState(num_requests=n, max_requests=1000, slots=frozenset(s), cached_tokens=cached if not i else 0)
            for i, (n, s) in enumerate(zip(open_requests, slots, strict=True))
        ]
        chosen = choose(RequestFacts(adapters=names_), replicas)
        slots[chosen].update(names_)
        open_requests[chosen] += 1
        most = min(open_requests) + max(MORE_REQUESTS, min(open_requests) // MORE_SHARE) + 1
        assert open_requests[chosen] <= most
        open_requests = [max(0, n - ended) for n, ended in zip(open_requests, ended_each_time, strict=True)]
    for stuck in (n for n, ended in zip(open_requests, ended_each_time, strict=True) if not ended):
        assert stuck <= MORE_REQUESTS + 1, "one that ends requests as they come has few, so the stuck one has, too"
