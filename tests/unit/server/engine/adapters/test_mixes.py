"""Mixes of adapters in the registry, under the real scheduler, with a store whose work ends when told to."""

from array import array
from pathlib import Path

import pytest

from stellarbyte_server.engine.state.kept_blocks import block_keys
from stellarbyte_server.engine.state.sequence import Sequence
from stellarbyte_server.protocol.messages import AdapterLoaded, AdapterUnloaded
from stellarbyte_server.protocol.request import RequestRejected
from tests.support.engines.adapter_engine import AdapterEngine


def content_of(sequence: Sequence) -> str:
    assert sequence.adapter is not None
    return sequence.adapter.content_hash


def first_key(engine: AdapterEngine, sequence: Sequence) -> bytes:
    """The key of its first block, if that held other tokens."""
    keys = block_keys(engine.scheduler.layout, sequence)
    keys.extend(array("I", range(100)), 100)
    return keys.keys[0]


def test_a_mix_takes_one_slot_and_is_shared_by_all_that_name_its_parts(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=1)
    first = engine.submit_mix("a+b", 1.0, 0.5)
    second = engine.submit_mix("b+a", 0.5, 1.0)
    assert first.adapter is second.adapter
    engine.run()
    assert content_of(first) == "1.0 hash of a + 0.5 hash of b"
    assert first.num_generated == second.num_generated == 4
    assert [version.name for version in engine.store.in_slots.values()] == ["a+b"]
    assert engine.submit_mix("a+b", 1.0, 0.5) and engine.step() != []  # at once


def test_other_scales_and_other_parts_are_other_mixes_with_a_prefix_cache_of_their_own(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=4, max_in_memory=8)
    sequences = [
        engine.submit_mix("a+b"),
        engine.submit_mix("a+b", 1.0, 0.5),
        engine.submit_mix("a+c"),
        engine.submit("a"),
    ]
    engine.run()
    assert len({sequence.adapter for sequence in sequences}) == 4
    assert len({first_key(engine, sequence) for sequence in sequences}) == 4
    again = engine.submit_mix("b+a")
    assert first_key(engine, again) == first_key(engine, sequences[0])


def test_mixes_are_not_listed_but_count_for_their_parts(folder: Path) -> None:
    engine = AdapterEngine(folder)
    engine.submit_mix("a+b", max_tokens=50)
    for _ in range(3):
        engine.step()
    assert [card.name for card in engine.cards()] == list("abcdefgh")
    assert [engine.card(name).num_running for name in "abc"] == [1, 1, 0]
    assert [engine.card(name).num_waiting for name in "abc"] == [0, 0, 0]
    assert [engine.card(name).tier for name in "abc"] == ["disk", "disk", "disk"]
    assert engine.card("a").content_hash == "hash of a"  # read for the mix
    engine.run()
    assert [engine.card(name).num_running for name in "ab"] == [0, 0]


def test_mixes_are_evicted_as_adapters_are_and_then_forgotten(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=2, max_in_memory=3)
    for i in range(40):
        engine.submit_mix("a+b", 1.0, i / 8)
        engine.run()
        assert len(engine.store.in_memory) <= 3 and len(engine.store.in_slots) <= 2
    a = engine.submit("a").adapter
    assert len(engine.adapters._lifetimes.mixes.of(a)) <= 4  # in memory, and the last made
    engine.submit_mix("a+b", 1.0, 0.0)  # evicted long since: put together again
    engine.run()


def test_a_running_mix_keeps_the_versions_that_it_was_accepted_with(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=3)
    assert isinstance(engine.load("x", "a"), AdapterLoaded)
    old = engine.submit_mix("b+x", max_tokens=30)
    waiting = engine.submit_mix("b+x", max_tokens=3)
    for _ in range(3):
        engine.step()
    assert isinstance(engine.load("x", "c", in_place=True), AdapterLoaded)
    new = engine.submit_mix("b+x", max_tokens=3)
    assert engine.card("x", "draining").num_running == 2
    engine.run()
    assert content_of(old) == content_of(waiting) == "1.0 hash of b + 1.0 hash of a"
    assert content_of(new) == "1.0 hash of b + 1.0 hash of c"
    assert old.num_generated == 30
    cards = [card for card in engine.cards() if card.name == "x"]
    assert [(card.content_hash, card.state) for card in cards] == [("hash of c", "ready")]
    names = sorted(version.name for version in engine.store.in_memory)
    assert names == ["b+x", "x"]  # the old mix went with its part


def test_a_replaced_part_that_was_never_in_memory_is_read_from_the_files_it_was_accepted_with(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=1)
    busy = engine.submit("d", 30)
    while not busy.is_running:
        engine.step()
    waiting = engine.submit_mix("a+b", max_tokens=2)  # no slot yet
    engine.load("a", "c", in_place=True)
    engine.run()
    assert content_of(waiting) == "1.0 hash of a + 1.0 hash of b" and waiting.num_generated == 2


def test_unloading_a_part_waits_for_the_mix_and_frees_what_it_held(folder: Path) -> None:
    engine = AdapterEngine(folder)
    engine.load("x", "a")
    running = engine.submit_mix("b+x", max_tokens=10)
    for _ in range(3):
        engine.step()
    assert engine.adapters.unload("u", "x") == []
    with pytest.raises(RequestRejected, match="'x' does not exist"):
        engine.submit_mix("b+x")
    engine.run()
    assert running.num_generated == 10
    assert [reply for reply in engine.replies if isinstance(reply, AdapterUnloaded)] == [AdapterUnloaded("u", 200)]
    assert not engine.store.in_memory and not engine.store.in_slots


def test_a_part_that_does_not_exist_is_named(folder: Path) -> None:
    engine = AdapterEngine(folder)
    with pytest.raises(RequestRejected, match="The model 'x/y' does not exist"):
        engine.submit_mix("a+x/y")
    sequence = engine.submit_mix("a+unknown")
    engine.step()
    refusal = engine.adapters.refusal(sequence)
    assert refusal is not None and "The model 'unknown' does not exist" in str(refusal)
    engine.end(sequence)
    assert engine.card("a").num_waiting == 0


def test_a_pin_of_a_part_is_checked_when_the_part_is_read(folder: Path) -> None:
    engine = AdapterEngine(folder)
    right, wrong = engine.submit_mix("a@hash of a+b"), engine.submit_mix("a+b@hash of x")
    engine.step()
    engine.step()
    refusal = engine.adapters.refusal(wrong)
    assert refusal is not None and "The model 'b@hash of x' does not exist" in str(refusal)
    assert engine.adapters.refusal(right) is None
    engine.end(wrong)
    engine.run()
    assert right.num_generated == 4


def test_a_part_that_cannot_be_read_fails_the_mix_and_later_ones_at_once(folder: Path) -> None:
    engine = AdapterEngine(folder)
    engine.store.errors["b"] = "b is broken."
    sequence = engine.submit_mix("a+b")
    engine.step()
    engine.step()
    refusal = engine.adapters.refusal(sequence)
    assert refusal is not None and str(refusal) == "b is broken."
    engine.end(sequence)
    with pytest.raises(RequestRejected, match=r"b is broken\."):
        engine.submit_mix("b+c")
    assert engine.submit("a") and engine.card("b", "failed").error == "b is broken."
    engine.run()


def test_a_mix_that_fails_leaves_its_parts_as_they_were(folder: Path) -> None:
    engine = AdapterEngine(folder)
    engine.store.errors["a+b"] = "its ranks add up to 128."
    sequence = engine.submit_mix("a+b")
    engine.step()
    engine.step()
    refusal = engine.adapters.refusal(sequence)
    assert refusal is not None and str(refusal) == "its ranks add up to 128."
    engine.end(sequence)
    assert engine.submit("a") and engine.submit_mix("a+c")
    engine.run()
    del engine.store.errors["a+b"]
    assert engine.submit_mix("a+b")
    engine.run()


def test_files_that_changed_since_a_part_was_read_fail_the_mix_once(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=1, max_in_memory=2)
    engine.submit("a")
    engine.run()
    for name in "cd":  # push it out of memory
        engine.submit(name)
        engine.run()
    assert engine.card("a").tier == "disk"
    engine.store.content = lambda version: f"new {version.name}"
    sequence = engine.submit_mix("a+b")
    engine.step()
    engine.step()
    refusal = engine.adapters.refusal(sequence)
    assert refusal is not None and "files of the adapter 'a' have changed" in str(refusal)
    engine.end(sequence)
    again = engine.submit_mix("a+b")
    engine.run()
    assert content_of(again) == "1.0 new a + 1.0 new b"
