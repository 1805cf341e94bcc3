"""The registry of adapters and its slots under the real scheduler, with a store whose work ends when told to."""

import random
from collections import defaultdict
from pathlib import Path

import pytest

from stellarbyte_server.api.contract.errors import from_engine
from stellarbyte_server.engine.adapters import refusals
from stellarbyte_server.engine.adapters.names import RETRY_FAILED_S
from stellarbyte_server.engine.adapters.slots import PATIENCE_S
from stellarbyte_server.engine.state.sequence import Sequence
from stellarbyte_server.protocol.adapter_versions import SetVersions
from stellarbyte_server.protocol.messages import AdapterLoaded, AdapterUnloaded, CallFailed, LoadAdapter
from stellarbyte_server.protocol.request import RequestRejected
from tests.support.engines.adapter_engine import AdapterEngine, stored


def test_a_folder_is_offered_read_on_first_use_and_stays_in_its_slot(folder: Path) -> None:
    engine = AdapterEngine(folder)
    assert engine.card("a").tier == "disk" and engine.card("a").content_hash == ""
    engine.submit("a")
    assert engine.step() == []  # it is being read
    assert engine.card("a", "loading").num_waiting == 1
    engine.run()
    card = engine.card("a")
    assert (card.tier, card.content_hash, card.num_running, card.num_waiting) == ("slot", "hash of a", 0, 0)
    assert engine.submit("a") and engine.step() != []  # at once


def test_what_was_used_least_recently_goes_down_a_tier(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=2, max_in_memory=3)
    for name in "abcd":
        engine.submit(name)
        engine.run()
    assert [engine.card(name).tier for name in "abcd"] == ["disk", "cpu", "slot", "slot"]
    engine.submit("a")
    engine.run()
    assert [engine.card(name).tier for name in "abcd"] == ["slot", "disk", "cpu", "slot"]
    assert len(engine.store.in_memory) <= 3


def test_a_request_that_waits_for_a_slot_holds_up_nobody(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=1)
    endless = engine.submit("a", 5_000)
    while not endless.is_running:
        engine.step()
    waiting = engine.submit("b")
    base = engine.submit(None)
    for _ in range(10):
        engine.step()
    assert base.num_generated == 4 and not waiting.is_running


def test_newcomers_do_not_keep_a_claimed_slot_busy(folder: Path) -> None:
    """Without claims, a stream of requests for one adapter would starve those for another for ever."""
    engine = AdapterEngine(folder, num_slots=1)
    for _ in range(3):
        engine.submit("a", 20)
    engine.step()
    engine.step()
    waiting = engine.submit("b", 2)
    num_steps = 0
    while waiting.num_generated < 2:
        engine.submit("a", 20)
        engine.step()
        num_steps += 1
        assert num_steps < 40  # the three that ran ended, and nobody else came in between


def test_after_its_patience_a_request_gets_the_slot_of_endless_ones(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=1)
    endless = engine.submit("a", 5000)
    for _ in range(5):
        engine.step()
    before = list(endless.tokens)
    waiting = engine.submit("b", 3)
    for _ in range(20):
        engine.now_s += PATIENCE_S / 10
        engine.step()
    assert waiting.num_generated == 3 and engine.scheduler.totals.num_preemptions == 1
    for _ in range(20):
        engine.step()
    assert endless.is_running and len(endless.tokens) > len(before)  # it got its slot back


def test_two_endless_requests_share_one_slot_in_turns(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=1)
    first, second = engine.submit("a", 8000), engine.submit("b", 8000)
    for _ in range(400):
        engine.now_s += PATIENCE_S / 20
        engine.step()
    assert min(first.num_generated, second.num_generated) > 100


def test_a_replacement_takes_effect_between_two_steps_and_running_requests_end_on_the_old_version(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=3)
    assert isinstance(engine.load("x", "a"), AdapterLoaded)
    old = engine.submit("x", 30)
    queued = engine.submit("x", 3)
    for _ in range(3):
        engine.step()
    loaded = engine.load("x", "b", in_place=True)
    assert isinstance(loaded, AdapterLoaded) and loaded.card.content_hash == "hash of b"
    new = engine.submit("x", 3)
    assert (old.adapter.content_hash, queued.adapter.content_hash, new.adapter.content_hash) == (
        "hash of a", "hash of a", "hash of b",
    )  # fmt: skip
    assert engine.card("x", "draining").num_running >= 1
    engine.run()
    assert [c.content_hash for c in engine.cards() if c.name == "x"] == ["hash of b"]
    assert len(engine.store.in_memory) == 1 and len(engine.store.in_slots) == 1


def test_the_same_content_again_changes_nothing(folder: Path) -> None:
    engine = AdapterEngine(folder)
    engine.load("x", "a")
    version = engine.submit("x").adapter
    engine.load("x", "a", in_place=True)
    assert engine.submit("x").adapter is version
    engine.run()
    assert len(engine.store.in_memory) == 1


def test_unloading_waits_for_requests_and_says_what_it_gave_back(folder: Path) -> None:
    engine = AdapterEngine(folder)
    engine.load("x", "a")
    running = engine.submit("x", 10)
    engine.step()
    assert engine.adapters.unload("u", "x") == []
    with pytest.raises(RequestRejected, match="'x' does not exist"):
        engine.submit("x")
    engine.run()
    assert running.num_generated == 10
    assert engine.replies == [AdapterUnloaded("u", 200)]  # from memory and from its slot
    assert not engine.store.in_memory and not engine.store.in_slots


def test_an_unloaded_folder_is_offered_again_once_it_was_loaded(folder: Path) -> None:
    engine = AdapterEngine(folder)
    assert engine.unload("a") == AdapterUnloaded("unload a", 0)
    with pytest.raises(RequestRejected):
        engine.submit("a")
    assert "a" not in [card.name for card in engine.cards()]
    assert isinstance(engine.unload("a"), CallFailed)
    engine.load("a", "a")
    engine.submit("a")
    engine.run()


def test_a_version_can_be_pinned(folder: Path) -> None:
    engine = AdapterEngine(folder)
    engine.load("x", "a")
    engine.submit("x@hash of a")
    with pytest.raises(RequestRejected, match="'x@hash of b' does not exist"):
        engine.submit("x@hash of b")
    unread = engine.submit("b@another hash")
    engine.step()
    engine.step()
    assert engine.adapters.refusal(unread) is not None


def test_an_adapter_that_cannot_be_read_is_refused_and_tried_again_later(folder: Path) -> None:
    engine = AdapterEngine(folder)
    engine.store.errors["a"] = "The adapter 'a' cannot be loaded: it is broken."
    sequence = engine.submit("a")
    engine.step()
    engine.step()
    refusal = engine.adapters.refusal(sequence)
    assert refusal is not None and "it is broken" in str(refusal)
    engine.end(sequence)
    assert engine.card("a", "failed").error == str(refusal)
    with pytest.raises(RequestRejected, match="it is broken"):
        engine.submit("a")
    del engine.store.errors["a"]
    engine.now_s += RETRY_FAILED_S + 1
    engine.submit("a")
    engine.run()


def test_a_failed_replacement_leaves_the_old_version(folder: Path) -> None:
    engine = AdapterEngine(folder)
    engine.load("x", "a")
    engine.store.errors["x"] = "broken"
    assert isinstance(engine.load("x", "b", in_place=True), CallFailed)
    assert engine.submit("x").adapter.content_hash == "hash of a"
    engine.run()
    assert len(engine.store.in_memory) == 1


def test_content_that_changed_on_disk_is_not_served_to_those_who_were_promised_the_old(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=1, max_in_memory=2)
    for name in "abc":  # c pushes a out of memory
        engine.submit(name)
        engine.run()
    engine.store.content = lambda _: "new content"
    sequence = engine.submit("a")
    engine.step()
    engine.step()
    refusal = engine.adapters.refusal(sequence)
    assert refusal is not None and "have changed" in str(refusal)
    engine.end(sequence)
    assert engine.submit("a").adapter.content_hash == ""  # whatever the files hold now
    engine.run()
    assert engine.card("a").content_hash == "new content"


def test_a_name_that_could_not_be_read_again_is_read_from_the_same_place_later(folder: Path) -> None:
    """It was then read from the folder of its own name, or gone if there was none."""
    engine = AdapterEngine(folder, num_slots=1, max_in_memory=2)
    engine.load("a", "b", in_place=True)
    engine.load("other", "c")
    for name in "def":
        engine.submit(name)
        engine.run()
    for name, content in (("a", "hash of b"), ("other", "hash of c")):
        assert engine.card(name).tier == "disk"
        engine.store.errors[name] = "the disk is away"
        failed = engine.submit(name)
        engine.step()
        engine.step()
        engine.end(failed)
        del engine.store.errors[name]
        engine.now_s += RETRY_FAILED_S + 1
        engine.submit(name)
        engine.run()
        assert engine.card(name).content_hash == content


def test_no_more_than_the_limit_stay_in_memory_however_many_are_loaded_at_once(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=1, max_in_memory=2)
    for name in "abcdefgh":
        engine.adapters.load(LoadAdapter(name, f"x{name}", stored(name), False))
    for _ in range(2):
        engine.replies += engine.adapters.collect()
    assert len(engine.store.in_memory) == 2 and len(engine.replies) == 8


def test_a_running_requests_copy_stays_in_memory_so_that_it_can_go_on_after_a_move(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=1, max_in_memory=2)
    endless = engine.submit("a", 5000)
    for _ in range(5):
        engine.step()
    engine.load("a", "b", in_place=True)
    for name in "cd":
        engine.submit(name, 2)
    for _ in range(60):
        engine.now_s += PATIENCE_S / 10
        engine.step()
    assert engine.scheduler.totals.num_preemptions > 0
    assert endless.adapter.content_hash == "hash of a" and endless.adapter.state == "draining"
    before = endless.num_generated
    for _ in range(40):
        engine.now_s += PATIENCE_S / 10
        engine.step()
    assert endless.num_generated > before


def test_listing_loads_nothing_and_changes_no_answer(folder: Path) -> None:
    engine = AdapterEngine(folder)
    assert engine.card("a").tier == "disk"
    assert isinstance(engine.load("a", "a"), AdapterLoaded)


def test_a_version_that_was_replaced_before_it_was_read_drains(folder: Path) -> None:
    engine = AdapterEngine(folder)
    engine.submit("a")
    engine.load("a", "b", in_place=True)
    states = [card.state for card in engine.cards() if card.name == "a" and card.is_current]
    assert states == ["ready"]
    engine.run()
    assert [card.content_hash for card in engine.cards() if card.name == "a"] == ["hash of b"]


def test_totals_belong_to_the_name_whatever_its_version(folder: Path) -> None:
    engine = AdapterEngine(folder)
    engine.load("x", "a")
    old = engine.submit("x").adapter
    engine.load("x", "b", in_place=True)
    old.totals.num_tokens += 5
    assert engine.card("x").num_tokens == 5


def test_loading_a_name_twice_at_once_is_refused(folder: Path) -> None:
    engine = AdapterEngine(folder)
    assert engine.adapters.load(LoadAdapter("1", "x", stored("a"), False)) == []
    setting = engine.adapters.set_versions(SetVersions("3", "x", "hash of a"))
    for refused in (*engine.adapters.load(LoadAdapter("2", "x", stored("b"), True)), *setting):
        assert "is being loaded" in refused.message
        assert from_engine(RequestRejected(refused.message, refused.code)).status == 409


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_events_leaves_nothing_behind(folder: Path, seed: int) -> None:
    """Requests, aborts, loads, replacements and unloads at random: always the right version, in the end all is 0."""
    chance = random.Random(seed)
    num_slots = chance.choice([1, 2, 3])
    max_in_memory = num_slots + chance.choice([1, 2, 5])
    engine = AdapterEngine(folder, num_slots=num_slots, max_in_memory=max_in_memory, max_num_seqs=6)
    live: list[Sequence] = []
    versions: defaultdict[str, list[str]] = defaultdict(list)
    for _ in range(300):
        engine.now_s += chance.random()
        name = chance.choice("abcdefgh")
        action = chance.random()
        try:
            if action < 0.4:
                live.append(engine.submit(chance.choice([name, name, None]), chance.randint(1, 30)))
            elif action < 0.5 and live:
                sequence = live.pop(chance.randrange(len(live)))
                if sequence.is_running or sequence in list(engine.scheduler.waiting):
                    engine.end(sequence)
            elif action < 0.6:
                path, in_place = chance.choice("abcdefgh"), chance.random() < 0.7
                engine.adapters.load(LoadAdapter("l", name, stored(path), in_place, probe=chance.random() < 0.1))
                versions[name].append(f"hash of {path}")
            elif action < 0.7 and versions[name]:
                first, second = chance.choices(versions[name], k=2)
                shares = () if chance.random() < 0.5 else ((first, 0.5), (second, 0.5)) if first != second else ()
                engine.adapters.set_versions(SetVersions("s", name, first, shares))
            elif action < 0.75:
                engine.adapters.unload("u", name)
            for probed in engine.adapters.take_probes():
                engine.replies += engine.adapters.note_probe(probed, refusals.changes_nothing(probed))
        except RequestRejected:
            pass
        engine.step()
        draining = [c for c in engine.cards() if c.state == "draining"]
        assert len(engine.store.in_memory) <= max_in_memory + len(draining) + 1  # one that was loaded just now
    for _ in range(2000):
        if not engine.scheduler.has_work:
            break
        engine.now_s += 0.1
        engine.step()
    assert not engine.scheduler.has_work
    engine.replies += engine.adapters.collect()
    engine.replies += engine.adapters.collect()
    cards = engine.cards()
    assert all((card.num_running, card.num_waiting) == (0, 0) and card.state == "ready" for card in cards)
    assert len(engine.store.in_memory) <= max_in_memory
    for name in [card.name for card in cards]:
        engine.replies += engine.adapters.unload("u", name)
    assert not engine.store.in_memory and not engine.store.in_slots
