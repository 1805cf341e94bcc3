"""The text of a scrape: numbers where they belong, labels that cannot break it; and that each is documented."""

import re

from prometheus_client.parser import text_string_to_metric_families

from stellarbyte_server.engine.request_totals import ABORT_REASONS, FINISH_REASONS, RequestTotals
from stellarbyte_server.observe.metrics import render_metrics
from stellarbyte_server.observe.reasons import REASONS
from stellarbyte_server.protocol.histogram import Buckets
from stellarbyte_server.protocol.messages import AdapterCard, AdapterList, EngineStats
from tests.support.metric_names import COUNTERS, GAUGES, HISTOGRAMS, check_exposition
from tests.support.servers.server_process import ROOT

STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    kv_cache_usage=0.25,
    num_blocks_used=1,
    prompt_tokens_total=11,
    generation_tokens_total=12,
    num_preemptions_total=13,
    num_steps_total=4,
    num_blocked=1,
    prefix_cache_queries_total=14,
    prefix_cache_hits_total=15,
    evicted_tokens_total=16,
    drafts_total=17,
    draft_tokens_total=18,
    accepted_tokens_total=19,
    accepted_by_place=(21, 22),
)


def card(name: str, *, is_current: bool = True, num_running: int = 0, num_waiting: int = 0) -> AdapterCard:
    return AdapterCard(
        name=name,
        is_current=is_current,
        state="ready",
        tier="slot",
        content_hash="0",
        root="/secret/path",
        rank=8,
        num_bytes=1,
        num_running=num_running,
        num_waiting=num_waiting,
        num_requests=1,
        num_tokens=20,
        error="",
    )


ADAPTERS = AdapterList(
    "call",
    (card("b", num_running=1), card("a", num_running=2), card("a", is_current=False, num_waiting=1)),
    Buckets(bounds=(0.5, 1.0), counts=(1, 2, 3), total=9.5),
    4,
)


def samples(text: str) -> dict[str, float]:
    """By the name and the labels beside the model's."""
    return {
        sample.name
        + "".join(f" {label}" for name, label in sample.labels.items() if name != "model_name"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_numbers_are_where_they_belong() -> None:
    totals = RequestTotals()
    totals.note_step(0.003, 40)
    text = render_metrics(totals.snapshot(STATS), "m", ADAPTERS, "cuda", is_healthy=True).decode()
    check_exposition(text, with_adapters=True)
    seen = samples(text)
    expected = {
        "stellarbyte:engine_healthy": 1,
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 2,
        "vllm:num_requests_waiting_by_reason capacity": 1,
        "vllm:num_requests_waiting_by_reason deferred": 1,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:prompt_tokens_total": 11,
        "vllm:generation_tokens_total": 12,
        "vllm:num_preemptions_total": 13,
        "vllm:prefix_cache_queries_total": 14,
        "vllm:prefix_cache_hits_total": 15,
        "stellarbyte:evicted_tokens_total": 16,
        "vllm:spec_decode_num_drafts_total": 17,
        "vllm:spec_decode_num_draft_tokens_total": 18,
        "vllm:spec_decode_num_accepted_tokens_total": 19,
        "vllm:spec_decode_num_accepted_tokens_per_pos_total 1": 22,
        "stellarbyte:adapter_resident a gpu": 1,
        "stellarbyte:adapter_tokens_total b": 20,
        "stellarbyte:adapter_load_seconds_bucket 0.5": 1,
        "stellarbyte:adapter_load_seconds_bucket 1.0": 3,
        "stellarbyte:adapter_load_seconds_bucket +Inf": 6,
        "stellarbyte:adapter_load_seconds_sum": 9.5,
        "stellarbyte:engine_step_seconds_bucket 0.0025": 0,
        "stellarbyte:engine_step_seconds_bucket 0.005": 1,
        "vllm:iteration_tokens_total_bucket 32.0": 0,
        "vllm:iteration_tokens_total_bucket 64.0": 1,
    }
    assert {name: seen[name] for name in expected} == expected
    assert any(name.startswith("vllm:lora_requests_info 4 a,b a") for name in seen)
    assert "/secret" not in text
    for name, labels in (
        ("vllm:request_success_total", FINISH_REASONS),
        ("stellarbyte:aborted_requests_total", ABORT_REASONS),
        ("stellarbyte:rejected_requests_total", REASONS),
    ):
        assert {f"{name} {label}" for label in labels} == {key for key in seen if key.startswith(name)}


def test_any_model_name_is_one_label() -> None:
    name = 'a "b"\\\nc{d="e"} 1'
    text = render_metrics(RequestTotals().snapshot(STATS), name, None, "cpu", is_healthy=False).decode()
    assert samples(text)["stellarbyte:engine_healthy"] == 0
    for family in text_string_to_metric_families(text):
        assert all(sample.labels["model_name"] == name for sample in family.samples)


def test_every_metric_and_every_reason_is_documented() -> None:
    document = (ROOT / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"\b(?:vllm|stellarbyte):\w+", document)) == GAUGES | COUNTERS | HISTOGRAMS
    for reason in (*REASONS, *ABORT_REASONS, *FINISH_REASONS):
        assert f"`{reason}`" in document, reason
