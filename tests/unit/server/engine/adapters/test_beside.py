"""Several versions under one name: pinned, divided among callers, set and restored, under the real scheduler."""

import math
from collections import Counter
from pathlib import Path

import pytest

from stellarbyte_server.engine.adapters.beside import share_of
from stellarbyte_server.engine.adapters.folder import stored_files
from stellarbyte_server.engine.adapters.names import RETRY_FAILED_S
from stellarbyte_server.protocol.adapter_reference import AdapterReference
from stellarbyte_server.protocol.adapter_versions import RecordedAdapters, RestoredAdapter, SetVersions, StoredAdapter
from stellarbyte_server.protocol.messages import AdapterLoaded, AdapterUnloaded, CallFailed, Settled
from stellarbyte_server.protocol.request import RequestRejected
from tests.support.engines.adapter_engine import AdapterEngine

CALLERS = [f"caller {number}" for number in range(4000)]


def stored(root: str) -> StoredAdapter:
    return StoredAdapter(folder=f"/data/{root}", root=root, content_hash=f"hash of {root}")


def loaded_beside(engine: AdapterEngine, root: str, name: str = "x", pinned: bool = False) -> AdapterLoaded:
    files = StoredAdapter(folder=f"/data/{root}", root=root)
    loaded = engine.prepare(name, files, pinned=pinned)
    assert isinstance(loaded, AdapterLoaded)
    return loaded


def set_versions(
    engine: AdapterEngine, current: str, *shares: tuple[str, float], name: str = "x", pinned: bool = False
) -> None:
    by_hash = tuple((f"hash of {root}", share) for root, share in shares)
    call = SetVersions("set", name, current and f"hash of {current}", by_hash, pinned)
    assert isinstance(engine.answer(engine.adapters.set_versions(call), "set"), Settled)


def content(engine: AdapterEngine, caller: str = "", pin: str | None = None) -> str:
    """What a request of a caller is bound to."""
    version = engine.adapters.bind(AdapterReference("x", pin), caller)
    engine.replies += engine.adapters.release(version)
    return version.content_hash.removeprefix("hash of ")


def test_shares_are_those_asked_for_the_same_for_a_caller_and_independent_of_other_names() -> None:
    shares = (("a", 0.1), ("b", 0.3), ("c", 0.6))
    got = {caller: share_of(shares, "x", caller) for caller in CALLERS}
    counts = Counter(got.values())
    for content_hash, share in shares:
        sigma = math.sqrt(share * (1 - share) * len(CALLERS))
        assert abs(counts[content_hash] - share * len(CALLERS)) < 4 * sigma
    assert got == {caller: share_of(shares, "x", caller) for caller in CALLERS}
    both = sum(got[caller] == "c" == share_of(shares, "y", caller) for caller in CALLERS)
    assert abs(both - 0.36 * len(CALLERS)) < 4 * math.sqrt(0.36 * 0.64 * len(CALLERS))
    more = {caller: share_of((("a", 0.2), ("b", 0.2), ("c", 0.6)), "x", caller) for caller in CALLERS}
    assert all(more[caller] == got[caller] or (got[caller], more[caller]) == ("b", "a") for caller in CALLERS)
    assert {share_of((("a", 0.0), ("b", 1.0)), "x", caller) for caller in CALLERS} == {"b"}
    assert {share_of((("a", 1 / 3),) * 1, "x", caller) for caller in CALLERS} == {"a"}  # rounding leaves nobody out


def test_a_version_beside_is_for_pins_until_it_gets_callers(folder: Path) -> None:
    engine = AdapterEngine(folder)
    engine.load("x", "a")
    loaded_beside(engine, "b")
    assert content(engine) == content(engine, "anybody") == "a"
    assert content(engine, pin="hash of b") == "b"
    set_versions(engine, "a", ("a", 0.5), ("b", 0.5))
    counts = Counter(content(engine, caller) for caller in CALLERS)
    assert abs(counts["b"] - len(CALLERS) / 2) < 4 * math.sqrt(len(CALLERS) / 4)
    assert {card.content_hash: (card.is_current, card.share) for card in engine.cards() if card.name == "x"} == {
        "hash of a": (True, 0.5),
        "hash of b": (False, 0.5),
    }
    set_versions(engine, "b")
    assert {content(engine, caller) for caller in CALLERS[:100]} == {"b"}
    assert [card.content_hash for card in engine.cards() if card.name == "x"] == ["hash of b"]
    with pytest.raises(RequestRejected):
        content(engine, pin="hash of a")
    assert len(engine.store.in_memory) == 1


def test_running_requests_keep_their_version_while_the_versions_change(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=3)
    engine.load("x", "a")
    loaded_beside(engine, "b")
    set_versions(engine, "a", ("b", 1.0))
    version = engine.adapters.bind(AdapterReference("x"), "ann")
    assert version.content_hash == "hash of b"
    set_versions(engine, "a")
    assert version.state == "draining" and content(engine, "ann") == "a"
    assert [card.state for card in engine.cards() if card.content_hash == "hash of b"] == ["draining"]
    engine.replies += engine.adapters.release(version)
    assert len(engine.store.in_memory) == 1


def test_the_stored_copy_stays_of_two_versions_with_the_same_content(folder: Path) -> None:
    """The folder's own adapter is replaced while a copy of it lies beside it: one is kept, the other is forgotten."""
    engine = AdapterEngine(folder, max_in_memory=5)
    engine.submit("a")
    engine.run()  # the folder's own
    for root in ("a", "b"):
        loaded_beside(engine, root, name="a")
    assert len(engine.store.in_memory) == 3
    set_versions(engine, "b", ("a", 0.5), ("b", 0.5), name="a")
    assert sorted(version.files == stored_files(stored("a")) for version in engine.store.in_memory) == [False, True]
    assert engine.unload("a") == AdapterUnloaded("unload a", 200 + 100)  # b has a slot, too
    assert not engine.store.in_memory and not engine.store.in_slots


def test_a_load_or_an_unloading_ends_a_split(folder: Path) -> None:
    engine = AdapterEngine(folder)
    for root in ("a", "b"):
        loaded_beside(engine, root)
    set_versions(engine, "a", ("a", 0.5), ("b", 0.5))
    engine.load("x", "c", in_place=True)
    assert {content(engine, caller) for caller in CALLERS[:100]} == {"c"} and len(engine.store.in_memory) == 1
    loaded_beside(engine, "b")
    set_versions(engine, "c", ("c", 0.5), ("b", 0.5))
    assert engine.unload("x") == AdapterUnloaded("unload x", 200 + 100)  # c has a slot, too
    assert not engine.store.in_memory and "x" not in [card.name for card in engine.cards()]


def test_versions_that_are_not_loaded_cannot_be_set_and_nothing_changes(folder: Path) -> None:
    engine = AdapterEngine(folder)
    loaded_beside(engine, "a")
    set_versions(engine, "a")
    loaded_beside(engine, "b")
    for current, shares in (
        ("hash of c", ()),
        ("hash of a", (("hash of c", 1.0),)),
        ("hash of c", (("hash of b", 1.0),)),
    ):
        (refused,) = engine.adapters.set_versions(SetVersions("set", "x", current, shares))
        assert isinstance(refused, CallFailed)
        assert content(engine, "ann") == "a" and content(engine, pin="hash of b") == "b"
    set_versions(engine, "")  # forgets what is beside
    with pytest.raises(RequestRejected):
        content(engine, pin="hash of b")


def test_restored_versions_are_read_on_first_use_and_must_be_as_they_were(folder: Path) -> None:
    engine = AdapterEngine(folder)
    shares = ((stored("a"), 0.5), (stored("b"), 0.5))
    engine.adapters.restore(RecordedAdapters(adapters=(RestoredAdapter(name="x", current=stored("a"), shares=shares),)))
    assert not engine.store.reads and {content(engine, caller) for caller in CALLERS[:100]} == {"a", "b"}
    engine.store.content = lambda _: "hash of others"
    caller = next(caller for caller in CALLERS if content(engine, caller) == "b")
    reference = AdapterReference("x")
    for bound in (engine.adapters.bind(reference, caller), engine.adapters.bind(AdapterReference("x", "hash of a"))):
        engine.adapters.memory.start_read(bound)
        engine.adapters.collect()
        assert bound.state == "failed" and "damaged" in bound.error
        engine.replies += engine.adapters.release(bound)
    with pytest.raises(RequestRejected, match="damaged"):
        content(engine, caller)
    del engine.store.content
    engine.now_s += RETRY_FAILED_S + 1
    assert content(engine, caller) == "b" and content(engine, pin="hash of a") == "a"


def test_loading_what_is_there_reads_nothing(folder: Path) -> None:
    engine = AdapterEngine(folder)
    loaded_beside(engine, "a")
    set_versions(engine, "a")
    again = engine.prepare("x", stored("a"))
    assert isinstance(again, AdapterLoaded) and not again.is_used and not engine.store.reads
    copy = engine.prepare("x", StoredAdapter(folder="/data/copy", root="a"))
    assert isinstance(copy, AdapterLoaded) and not copy.is_used  # the same content in other files
    assert engine.adapters._names.current["x"].files.asked == "/data/a" and len(engine.store.in_memory) == 1


def test_a_restored_adapter_replaces_one_of_the_start(folder: Path) -> None:
    engine = AdapterEngine(folder)
    engine.load("x", "a")
    engine.adapters.restore(RecordedAdapters(adapters=(RestoredAdapter(name="x", current=stored("b")),)))
    engine.adapters.collect()
    assert content(engine) == "b" and not engine.store.in_memory and not engine.store.in_slots


def test_restoring_what_is_there_changes_nothing(folder: Path) -> None:
    engine = AdapterEngine(folder)
    split = RestoredAdapter(name="x", current=stored("a"), shares=((stored("a"), 0.5), (stored("b"), 0.5)), pinned=True)
    engine.adapters.restore(RecordedAdapters(adapters=(split,)))
    bound = engine.submit("x")
    engine.run()
    before = engine.cards()
    engine.adapters.restore(RecordedAdapters(adapters=(split,)))
    assert engine.cards() == before and bound.adapter.state == "ready"
    loaded_beside(engine, "c")  # which is being prepared by another HTTP process
    engine.adapters.restore(RecordedAdapters(adapters=(split,)))
    assert content(engine, pin="hash of c") == "c"
    engine.adapters.restore(RecordedAdapters(adapters=(RestoredAdapter(name="x", current=stored("b")),)))
    assert content(engine) == "b" and not engine.card("x").pinned


def test_a_pin_follows_the_current_version_and_a_restart(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=2, max_in_memory=3)
    loaded_beside(engine, "a", pinned=True)
    assert "x" not in {card.name for card in engine.cards() if card.pinned}, "not before it is current"
    set_versions(engine, "a", pinned=True)
    assert engine.card("x").pinned and engine.card("x").tier == "slot"
    loaded_beside(engine, "b")
    set_versions(engine, "b", ("a", 0.5), ("b", 0.5), pinned=True)
    assert {card.content_hash: card.pinned for card in engine.cards() if card.name == "x"} == {
        "hash of a": False,
        "hash of b": True,
    }
    for name in "cdefgh":
        engine.submit(name)
        engine.run()
    assert next(card.tier for card in engine.cards() if card.name == "x" and card.is_current) == "slot"
    set_versions(engine, "a")
    assert not any(card.pinned for card in engine.cards())

    again = AdapterEngine(folder, num_slots=2)
    again.adapters.restore(RecordedAdapters(adapters=(RestoredAdapter(name="x", current=stored("a"), pinned=True),)))
    for _ in range(3):
        again.adapters.collect()
    assert again.card("x").pinned and again.card("x").tier == "slot", "without any request for it"


def test_a_slot_is_left_however_pins_are_set(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=2)
    loaded_beside(engine, "a", pinned=True)
    refused = engine.prepare("y", StoredAdapter(folder="/data/b", root="b"), pinned=True)
    assert isinstance(refused, CallFailed) and refused.param == "pinned" and "x are" in refused.message
    set_versions(engine, "")  # the first load is given up
    loaded_beside(engine, "b", "y", pinned=True)
    set_versions(engine, "b", name="y", pinned=True)
    assert engine.card("y").pinned
    few = AdapterEngine(folder, num_slots=2)  # --max-loras was larger before
    few.adapters.restore(
        RecordedAdapters(adapters=tuple(RestoredAdapter(name=name, current=stored(name), pinned=True) for name in "ab"))
    )
    assert {card.name: card.pinned for card in few.cards() if card.name in "ab"} == {"a": True, "b": False}
