"""The report of several engines as one."""

from stellarbyte_server.client.replicas.sums import merged_lists, sum_of_totals
from stellarbyte_server.engine.request_totals import RequestTotals
from stellarbyte_server.protocol.histogram import Buckets
from stellarbyte_server.protocol.messages import AdapterCard, AdapterList, EngineStats, EngineTotals
from tests.support.stubs.adapter_cards import adapter_card as card


def totals(scale: int, usage: float) -> EngineTotals:
    stats = EngineStats(
        num_running=scale,
        num_waiting=2 * scale,
        kv_cache_usage=usage,
        num_blocks_used=3 * scale,
        prompt_tokens_total=4 * scale,
        generation_tokens_total=5 * scale,
        num_preemptions_total=6 * scale,
        num_steps_total=7 * scale,
    )
    counts = RequestTotals()
    for _ in range(scale):
        counts.note_step(0.01, 3)
    counts._finished["stop"] = scale
    return counts.snapshot(stats)


def test_counts_are_added_and_the_use_of_the_cache_is_the_mean() -> None:
    whole = sum_of_totals([totals(1, 0.2), totals(10, 0.4)])
    stats = whole.stats
    assert (stats.num_running, stats.num_waiting, stats.prompt_tokens_total, stats.num_steps_total) == (11, 22, 44, 77)
    assert abs(stats.kv_cache_usage - 0.3) < 1e-9
    assert whole.finished == {"stop": 11, "length": 0}
    assert whole.step_s.num_values == 11 and abs(whole.step_s.total - 0.11) < 1e-9
    assert sum_of_totals([totals(3, 0.5)]) == totals(3, 0.5)


def test_a_process_that_has_ended_leaves_its_counts_but_no_requests() -> None:
    whole = sum_of_totals([totals(1, 0.2)], [totals(10, 0.9)])
    stats = whole.stats
    assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (1, 2, 3)
    assert (stats.generation_tokens_total, whole.finished["stop"]) == (55, 11)
    assert stats.kv_cache_usage == 0.2, "the mean over processes that run"
    gone = sum_of_totals((), [totals(1, 0.9)]).stats
    assert (gone.num_running, gone.num_waiting, gone.num_blocked, gone.num_blocks_used, gone.kv_cache_usage) == (0,) * 5


def listed(*cards: AdapterCard) -> AdapterList:
    return AdapterList("id", cards, Buckets(bounds=(1.0,), counts=(1, 0), total=0.5), 4)


def test_adapters_have_one_card_each() -> None:
    whole = merged_lists(
        [
            listed(card("a", tier="slot", content_hash="h", num_bytes=9, num_running=2, num_tokens=5), card("b")),
            listed(card("a", num_running=1, num_tokens=7), card("b", state="failed", error="no")),
            listed(card("a", is_current=False, state="draining", content_hash="old", num_running=1)),
        ]
    )
    assert [(each.name, each.is_current) for each in whole.cards] == [("a", True), ("a", False), ("b", True)]
    best, _, other = whole.cards
    assert (best.tier, best.content_hash, best.num_bytes, best.num_running, best.num_tokens) == ("slot", "h", 9, 3, 12)
    assert (other.state, other.error) == ("ready", ""), "one that could not be read elsewhere is served"
    assert whole.load_seconds == Buckets(bounds=(1.0,), counts=(3, 0), total=1.5) and whole.num_slots == 12
