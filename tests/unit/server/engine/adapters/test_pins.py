"""Pinned adapters under the real scheduler: they keep their slots, and the others share what is left."""

import random
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stellarbyte_server.engine.request_totals import RequestTotals
from stellarbyte_server.observe.metrics import render_metrics
from stellarbyte_server.protocol.messages import AdapterList, AdapterLoaded, CallFailed, LoadAdapter
from tests.support.engines.adapter_engine import AdapterEngine, stored
from tests.support.metric_names import CACHE, STATS


def tier(engine: AdapterEngine, name: str) -> str:
    return engine.card(name).tier


def test_a_pinned_adapter_keeps_its_slot_while_others_come_and_go(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=2, max_in_memory=3)
    loaded = engine.load("x", "a", pinned=True)
    assert isinstance(loaded, AdapterLoaded) and loaded.card.pinned
    for name in "bcdefgh":
        engine.submit(name)
        engine.run()
        assert tier(engine, "x") == "slot" and tier(engine, name) == "slot"
    assert engine.card("x").pinned and not engine.card("h").pinned
    engine.load("x", "a", in_place=True, pinned=False)
    for name in "bc":
        engine.submit(name)
        engine.run()
    assert tier(engine, "x") != "slot"


def test_a_pin_takes_an_idle_slot_at_once_and_a_busy_one_when_its_requests_end(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=2)
    for name in "ab":
        engine.submit(name)
        engine.run()
    engine.load("x", "c", pinned=True)
    assert tier(engine, "x") == "slot"

    busy = AdapterEngine(folder, num_slots=2, max_in_memory=3)
    running = [busy.submit(name, 30) for name in "ab"]
    while not all(sequence.is_running for sequence in running):
        busy.step()
    busy.load("x", "c", pinned=True)
    assert tier(busy, "x") == "cpu"
    waiting = busy.submit("d")  # it may put the pinned one out of memory
    busy.run()
    assert waiting.num_generated == 4
    busy.step()
    busy.step()
    assert tier(busy, "x") == "slot", "without any request for it"


def test_one_slot_stays_for_those_that_are_not_pinned(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=3)
    for name, path in (("x", "a"), ("y", "b")):
        assert isinstance(engine.load(name, path, pinned=True), AdapterLoaded)
    refused = engine.load("z", "c", pinned=True)
    assert isinstance(refused, CallFailed) and refused.param == "pinned"
    assert refused.message == "At most 2 adapters can be pinned, one fewer than --max-loras; x, y are."
    assert isinstance(engine.load("y", "c", in_place=True, pinned=True), AdapterLoaded), "its own pin counts once"
    engine.unload("x")
    assert isinstance(engine.load("z", "c", pinned=True), AdapterLoaded)
    assert isinstance(AdapterEngine(folder, num_slots=1).load("x", "a", pinned=True), CallFailed)


def test_pins_that_are_being_loaded_count(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=2)
    assert engine.adapters.load(LoadAdapter("1", "x", stored("a"), False, True)) == []
    (refused,) = engine.adapters.load(LoadAdapter("2", "y", stored("b"), False, True))
    assert isinstance(refused, CallFailed) and "x" in refused.message
    engine.store.errors["x"] = "It is broken."
    engine.adapters.collect()
    engine.adapters.collect()
    assert engine.adapters.load(LoadAdapter("3", "y", stored("b"), False, True)) == [], "the failed load has no pin"


def test_a_replacement_keeps_the_pin_unless_it_says_otherwise(folder: Path) -> None:
    engine = AdapterEngine(folder, num_slots=3)
    engine.load("x", "a", pinned=True)
    old = engine.submit("x", 20)
    for _ in range(3):
        engine.step()
    engine.load("x", "b", in_place=True)
    assert engine.card("x").pinned and not engine.card("x", "draining").pinned
    engine.run()
    assert old.num_generated == 20 and engine.card("x").tier == "slot"
    assert engine.load("x", "b", in_place=True, pinned=False).card.pinned is False  # the same content
    engine.unload("x")
    assert engine.load("x", "b").card.pinned is False, "unloading ends the pin"


@pytest.mark.parametrize("seed", range(3))
def test_metrics_show_what_is_in_slots_and_memory_after_random_operations(folder: Path, seed: int) -> None:
    """The oracle is the store, which moves what the registry tells it to; pinned ones stay."""
    numbers = random.Random(seed)
    engine = AdapterEngine(folder, num_slots=3, max_in_memory=4)
    names: set[str] = set()  # loaded
    pinned: set[str] = set()
    for _ in range(150):
        action, name = numbers.random(), numbers.choice("xyz")
        if action < 0.5:
            engine.submit(numbers.choice(["a", "b", "c", "d", "e", *sorted(names)]), numbers.randint(1, 6))
        elif action < 0.8:
            wanted = numbers.choice([True, False, None])
            loaded = engine.load(name, numbers.choice("abcdefgh"), numbers.random() < 0.7, pinned=wanted)
            if isinstance(loaded, AdapterLoaded):
                pinned = pinned - {name} if wanted is False else pinned | ({name} if wanted else set())
                names.add(name)
        else:
            engine.adapters.unload("u", name)
            engine.pins.discard(name)
            pinned.discard(name)
            names.discard(name)
        for _ in range(numbers.randint(0, 3)):
            engine.step()
    engine.run()
    for _ in range(4):
        engine.step()
    listed = engine.listed()
    shown = loaded_series(listed)
    versions = {version: "gpu" for version in engine.store.in_slots.values()}
    versions |= {version: "cpu" for version in engine.store.in_memory if version not in versions}
    expected = {
        (version.name, level, "true" if version.name in pinned else "false", "4") for version, level in versions.items()
    }
    assert shown["vllm:lora_adapter_loaded"] == expected
    assert {name for name, level, is_pinned, _ in expected if is_pinned == "true" and level == "gpu"} == pinned
    assert shown["vllm:num_gpu_loaded_lora_adapters"] == len(engine.store.in_slots)
    assert shown["vllm:num_cpu_loaded_lora_adapters"] == len(engine.store.in_memory)
    assert shown["vllm:max_gpu_lora_adapters"] == 3


def loaded_series(listed: AdapterList) -> dict[str, object]:
    text = render_metrics(RequestTotals().snapshot(STATS), "m", listed, "cpu", is_healthy=True, cache_config=CACHE)
    families = {family.name: family.samples for family in text_string_to_metric_families(text.decode())}
    return {
        name: samples[0].value if set(samples[0].labels) == {"model_name"} else {labels_of(s.labels) for s in samples}
        for name, samples in families.items()
        if "lora_adapter" in name and samples and "seconds" not in name
    }


def labels_of(labels: dict[str, str]) -> tuple[str, ...]:
    return labels["adapter_name"], labels["level"], labels["pinned"], labels["rank"]
