"""The text of a scrape: numbers where they belong, labels that cannot break it; and that each is documented."""

import re

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from stellarbyte_server.engine.request_totals import ABORT_REASONS, FINISH_REASONS, RequestTotals
from stellarbyte_server.observe.metrics import render_metrics
from stellarbyte_server.observe.reasons import REASONS
from stellarbyte_server.protocol.histogram import Buckets
from stellarbyte_server.protocol.messages import AdapterCard, AdapterList
from tests.support.metric_names import BY_ENGINE, CACHE, COUNTERS, GAUGES, HISTOGRAMS, STATS, check_exposition
from tests.support.servers.server_process import ROOT


def card(
    name: str,
    *,
    is_current: bool = True,
    num_running: int = 0,
    num_waiting: int = 0,
    tier: str = "slot",
    pinned: bool = False,
) -> AdapterCard:
    return AdapterCard(
        name=name,
        is_current=is_current,
        state="ready",
        tier=tier,
        pinned=pinned,
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
    (
        card("b", num_running=1),
        card("a", num_running=2, pinned=True),
        card("a", is_current=False, num_waiting=1),
        card("c", tier="cpu"),
        card("d", tier="disk"),
    ),
    Buckets(bounds=(0.5, 1.0), counts=(1, 2, 3), total=9.5),
    4,
    3,
    2,
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
    text = render_metrics(totals.snapshot(STATS), "m", ADAPTERS, "cuda", is_healthy=True, cache_config=CACHE).decode()
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
        "vllm:external_prefix_cache_queries_total": 31,
        "vllm:external_prefix_cache_hits_total": 32,
        "stellarbyte:kv_offload_stored_blocks_total memory": 33,
        "stellarbyte:kv_offload_stored_blocks_total disk": 34,
        "stellarbyte:kv_offload_loaded_blocks_total memory": 35,
        "stellarbyte:kv_offload_loaded_blocks_total disk": 36,
        "vllm:kv_offload_store_bytes_total memory": 37,
        "vllm:kv_offload_store_bytes_total disk": 38,
        "vllm:kv_offload_load_bytes_total memory": 39,
        "vllm:kv_offload_load_bytes_total disk": 40,
        "stellarbyte:kv_offload_dropped_blocks_total": 41,
        "stellarbyte:adapter_resident a gpu": 1,
        "stellarbyte:adapter_tokens_total b": 20,
        "vllm:cache_config_info 16 float32 True 0.9 77": 1,
        "vllm:num_gpu_loaded_lora_adapters": 3,
        "vllm:num_cpu_loaded_lora_adapters": 2,
        "vllm:max_gpu_lora_adapters": 4,
        "vllm:lora_adapter_load_seconds_bucket 1.0": 3,
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
    loaded = {name for name in seen if name.startswith("vllm:lora_adapter_loaded ")}
    assert loaded == {f"vllm:lora_adapter_loaded {labels} 8" for labels in ("a gpu true", "b gpu false", "c cpu false")}
    assert "/secret" not in text
    for name, labels in (
        ("vllm:request_success_total", FINISH_REASONS),
        ("stellarbyte:aborted_requests_total", ABORT_REASONS),
        ("stellarbyte:rejected_requests_total", REASONS),
    ):
        assert {f"{name} {label}" for label in labels} == {key for key in seen if key.startswith(name)}


def test_any_model_name_is_one_label() -> None:
    name = 'a "b"\\\nc{d="e"} 1'
    text = render_metrics(
        RequestTotals().snapshot(STATS), name, None, "cpu", is_healthy=False, cache_config=CACHE
    ).decode()
    assert samples(text)["stellarbyte:engine_healthy"] == 0
    for family in text_string_to_metric_families(text):
        assert all(sample.labels["model_name"] == name for sample in family.samples)


def test_each_of_several_engines_is_shown_and_one_is_not() -> None:
    totals, idle = RequestTotals().snapshot(STATS), msgspec.structs.replace(STATS, num_running=0, kv_cache_usage=0.0)
    engines = [(True, STATS), (False, idle)]
    text = render_metrics(totals, "m", None, "cpu", is_healthy=True, cache_config=CACHE, engines=engines).decode()
    seen = {
        (sample.name, sample.labels["engine"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "engine" in sample.labels
    }
    assert {name for name, _ in seen} == BY_ENGINE
    assert [seen["stellarbyte:engine_up", each] for each in "01"] == [1, 0]
    assert [seen["stellarbyte:engine_requests_running", each] for each in "01"] == [STATS.num_running, 0]
    assert [seen["stellarbyte:engine_kv_cache_usage_perc", each] for each in "01"] == [STATS.kv_cache_usage, 0]
    assert seen["stellarbyte:engine_generation_tokens_total", "1"] == STATS.generation_tokens_total
    one = render_metrics(totals, "m", None, "cpu", is_healthy=True, cache_config=CACHE, engines=engines[:1]).decode()
    assert not any(name in one for name in BY_ENGINE)


def test_every_metric_and_every_reason_is_documented() -> None:
    document = (ROOT / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"\b(?:vllm|stellarbyte):\w+", document)) == GAUGES | COUNTERS | HISTOGRAMS | BY_ENGINE
    for reason in (*REASONS, *ABORT_REASONS, *FINISH_REASONS):
        assert f"`{reason}`" in document, reason
