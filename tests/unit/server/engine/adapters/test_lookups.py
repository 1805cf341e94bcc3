"""Adapters are found and listed by another thread: what requests and calls get meanwhile, and in the end."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from stellarbyte_server.engine.adapters.listing import LISTING_LASTS_S, LISTING_PATIENCE_S
from stellarbyte_server.engine.adapters.names import RETRY_FAILED_S
from stellarbyte_server.protocol.adapter_versions import RecordedAdapters
from stellarbyte_server.protocol.messages import AdapterUnloaded, CallFailed, LoadAdapter
from stellarbyte_server.protocol.request import RequestRejected
from tests.support.engines.adapter_engine import AdapterEngine, stored
from tests.support.models.adapters import touch_adapter

FILE_CALLS = ("stat", "lstat", "listdir", "scandir", "open", "readlink")


def test_the_engines_thread_looks_at_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may take any time, and a folder hold thousands of adapters: steps must not wait for either."""
    engine = AdapterEngine(folder)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the engine's thread looked at a file")

    def act() -> None:
        """Whatever requests and calls may ask, up to what another thread is to do for it."""
        with monkeypatch.context() as forbidden:
            for name in FILE_CALLS:
                forbidden.setattr(os, name, refuse)
            engine.now_s += LISTING_LASTS_S + RETRY_FAILED_S
            for name in ("a", "unknown", "d"):
                with contextlib.suppress(RequestRejected):
                    engine.submit(name)
            engine.adapters.load(LoadAdapter("l", "x", stored("b"), True))
            engine.adapters.locate("l", "deep/path")
            engine.adapters.locate("l", str(folder / "b"))
            engine.adapters.restore(RecordedAdapters(withdrawn=("e",)))
            engine.adapters.unload("u", "c")
            engine.adapters.unload("u", "a")
            engine.adapters.list_all("list")
            engine.scheduler.schedule()

    for _ in range(3):
        act()
        engine.replies += engine.adapters.collect()


def test_a_model_that_is_not_there_is_not_found_once_the_disk_was_asked(folder: Path) -> None:
    engine = AdapterEngine(folder)
    sequence = engine.submit("unknown")
    assert engine.adapters.refusal(sequence) is None
    engine.step()
    refusal = engine.adapters.refusal(sequence)
    assert refusal is not None and refusal.code == "model_not_found" and "'unknown'" in str(refusal)
    assert "unknown" not in [card.name for card in engine.cards()]
    engine.end(sequence)
    assert not engine.adapters._names.current and not engine.adapters._lifetimes.others
    touch_adapter(folder / "unknown")
    engine.submit("unknown")
    engine.run()
    assert engine.card("unknown").tier == "slot"


def test_names_that_are_not_there_take_no_slot_and_no_memory_from_others(folder: Path) -> None:
    """They are more important than the one request for an adapter that is there, and more than there are slots."""
    engine = AdapterEngine(folder, num_slots=2)
    for i in range(20):
        engine.submit(f"unknown-{i}", priority=-100)
    waiting = engine.submit("a")
    plan = engine.adapters.slots.plan(list(engine.scheduler.waiting), 0.0)
    assert plan.read == []  # of a it is not known yet either
    engine.adapters.collect()
    plan = engine.adapters.slots.plan(list(engine.scheduler.waiting), 0.0)
    assert [version.name for version in plan.read][-1] == waiting.adapter.name


def test_a_list_waits_for_one_look_and_not_for_a_disk_that_hangs(folder: Path) -> None:
    engine = AdapterEngine(folder)
    assert engine.adapters.list_all("1") == engine.adapters.list_all("2") == []
    assert len(engine.store.looks) == 1
    first, second = engine.adapters.collect()
    assert [card.name for card in first.cards] == list("abcdefgh") and first.cards == second.cards
    touch_adapter(folder / "i")
    (again,) = engine.adapters.list_all("3")
    assert again.cards == first.cards  # it is new enough
    engine.now_s += LISTING_LASTS_S
    assert engine.adapters.list_all("4") == []
    engine.now_s += LISTING_PATIENCE_S + 0.1
    (late,) = engine.adapters.list_all("5")
    assert late.cards == first.cards and len(engine.store.looks) == 1
    (fourth,) = engine.adapters.collect()
    assert fourth.call_id == "4" and [card.name for card in fourth.cards] == list("abcdefghi")


def test_a_name_without_a_folder_that_was_unloaded_is_free_for_one_that_comes_later(folder: Path) -> None:
    engine = AdapterEngine(folder)
    engine.load("x", "a")
    assert isinstance(engine.unload("x"), AdapterUnloaded)
    engine.adapters.collect()
    touch_adapter(folder / "x")
    engine.submit("x")
    engine.run()
    assert engine.card("x").content_hash == "hash of x"
    assert isinstance(engine.unload("nothing"), CallFailed)


def test_a_failed_adapter_whose_folder_is_a_link_now_is_read_from_where_that_leads(folder: Path) -> None:
    """So are releases put in place. A link that came meanwhile is not followed, but the next try looks anew."""
    engine = AdapterEngine(folder)
    engine.store.errors["a"] = "a link is in its place"
    failed = engine.submit("a")
    engine.step()
    engine.step()
    engine.end(failed)
    shutil.rmtree(folder / "a")
    (folder / "a").symlink_to(folder / "b")
    engine.store.errors.clear()
    engine.now_s += RETRY_FAILED_S + 1
    engine.submit("a")
    engine.run()
    assert engine.card("a").content_hash == "hash of b"
