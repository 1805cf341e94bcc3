"""Loads that become current when all engines of a server have read them, or not at all."""

import random
from pathlib import Path

import pytest

from stellarbyte_server.protocol.messages import AdapterLoaded, AdapterUnloaded, CallFailed, LoadAdapter, Reply, Settled
from tests.support.engines.adapter_engine import AdapterEngine


def hold(engine: AdapterEngine, name: str, path: str, call_id: str = "hold") -> Reply:
    return engine.answer(engine.adapters.load(LoadAdapter(call_id, name, path, True, is_held=True)), call_id)


def test_a_held_adapter_serves_nothing_until_it_is_committed(folder: Path) -> None:
    engine = AdapterEngine(folder)
    engine.load("x", "a")
    running = engine.submit("x", 30)
    engine.step()
    held = hold(engine, "x", "b")
    assert isinstance(held, AdapterLoaded) and held.card.content_hash == "hash of b"
    assert (engine.submit("x").adapter.content_hash, engine.card("x").content_hash) == ("hash of a", "hash of a")
    for refused in (engine.load("x", "c", in_place=True), engine.unload("x")):
        assert isinstance(refused, CallFailed) and "is being loaded" in refused.message
    done = engine.answer(engine.adapters.held.commit("commit", "hold"), "commit")
    assert isinstance(done, AdapterLoaded) and done.card.content_hash == "hash of b"
    assert engine.submit("x").adapter.content_hash == "hash of b"
    assert running.adapter.content_hash == "hash of a", "a request keeps its version"
    engine.run()
    assert [card.content_hash for card in engine.cards() if card.name == "x"] == ["hash of b"]
    assert isinstance(engine.adapters.held.commit("again", "hold")[0], CallFailed)


@pytest.mark.parametrize("num_collected", [0, 1, 2, 3])
def test_a_discarded_adapter_leaves_nothing_however_far_it_was_read(folder: Path, num_collected: int) -> None:
    engine = AdapterEngine(folder)
    engine.load("x", "a")
    before = engine.cards()
    assert engine.adapters.load(LoadAdapter("hold", "x", "b", True, is_held=True)) == []
    for _ in range(num_collected):
        engine.adapters.collect()
    assert isinstance(engine.answer(engine.adapters.held.discard("discard", "hold"), "discard"), Settled)
    for _ in range(4):
        engine.adapters.collect()
    assert engine.cards() == before
    assert len(engine.store.in_memory) == 1
    assert isinstance(engine.adapters.held.commit("commit", "hold")[0], CallFailed)
    assert isinstance(engine.load("x", "b", in_place=True), AdapterLoaded)


def test_one_that_cannot_be_read_says_so_and_is_gone(folder: Path) -> None:
    engine = AdapterEngine(folder)
    failed = hold(engine, "x", "no-such-folder")
    assert isinstance(failed, CallFailed)
    assert engine.adapters.held.discard("discard", "hold") == [Settled("discard")]
    assert "x" not in {card.name for card in engine.cards()}
    assert isinstance(engine.load("x", "a"), AdapterLoaded)


def test_calls_have_taken_effect_when_they_are_settled(folder: Path) -> None:
    engine = AdapterEngine(folder)
    engine.load("x", "a")
    busy = engine.submit("x", 50)
    engine.step()
    assert engine.adapters.unload("unload x", "x") == []  # until its request ends
    assert engine.adapters.unload("unload b", "b") == []  # until the folder is looked up
    engine.adapters.held.settle("settle")
    replies: list[Reply] = []
    while not any(isinstance(reply, Settled) for reply in replies):
        replies += engine.adapters.collect()
    assert [type(reply) for reply in replies] == [AdapterUnloaded, Settled]
    assert {card.name for card in engine.cards() if card.is_current}.isdisjoint({"x", "b"})
    engine.end(busy)


def test_random_loads_held_and_not_leave_each_name_with_what_was_made_current(folder: Path) -> None:
    for seed in range(20):
        chance, engine = random.Random(seed), AdapterEngine(folder)
        current: dict[str, str] = {}
        for number in range(40):
            name, path = chance.choice("xyz"), chance.choice("abc")
            if chance.random() < 0.3:
                assert isinstance(engine.load(name, path, in_place=True), AdapterLoaded)
                current[name] = f"hash of {path}"
                continue
            assert isinstance(hold(engine, name, path, f"hold {number}"), AdapterLoaded)
            if chance.random() < 0.5:
                (*_, done) = engine.adapters.held.commit("commit", f"hold {number}")
                assert isinstance(done, AdapterLoaded)
                current[name] = f"hash of {path}"
            else:
                engine.adapters.held.discard("discard", f"hold {number}")
            if name in current:
                engine.submit(name)
            engine.step()
            served = {card.name: card.content_hash for card in engine.cards() if card.is_current and card.name in "xyz"}
            assert served == current
        engine.run()


def test_a_pinned_adapter_gets_an_idle_slot_when_it_is_committed(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=2)
    for name in "ab":
        engine.submit(name)
        engine.run()
    engine.answer(engine.adapters.load(LoadAdapter("hold", "x", "c", True, True, is_held=True)), "hold")
    assert engine.card("a").tier == engine.card("b").tier == "slot"
    engine.answer(engine.adapters.held.commit("commit", "hold"), "commit")
    engine.adapters.collect()
    assert (engine.card("x").tier, engine.card("x").pinned) == ("slot", True)
