"""The names of the server's metrics, which alerts, dashboards and autoscalers rely on, by their type."""

import re

from prometheus_client.parser import text_string_to_metric_families

from stellarbyte_server.protocol.messages import EngineStats
from stellarbyte_server.protocol.offload_stats import OffloadStats

GAUGES = {
    "stellarbyte:engine_healthy",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_requests_waiting_by_reason",
    "vllm:kv_cache_usage_perc",
    "vllm:lora_requests_info",
    "stellarbyte:adapter_resident",
    "vllm:cache_config_info",
    "vllm:lora_adapter_loaded",
    "vllm:num_gpu_loaded_lora_adapters",
    "vllm:num_cpu_loaded_lora_adapters",
    "vllm:max_gpu_lora_adapters",
}
COUNTERS = {
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:request_success_total",
    "stellarbyte:adapter_tokens_total",
    "stellarbyte:adapter_version_requests_total",
    "stellarbyte:adapter_version_tokens_total",
    "stellarbyte:evicted_tokens_total",
    "stellarbyte:kv_event_batches_total",
    "stellarbyte:kv_event_batches_dropped_total",
    "vllm:external_prefix_cache_queries_total",
    "vllm:external_prefix_cache_hits_total",
    "vllm:kv_offload_store_bytes_total",
    "vllm:kv_offload_load_bytes_total",
    "stellarbyte:kv_offload_stored_blocks_total",
    "stellarbyte:kv_offload_loaded_blocks_total",
    "stellarbyte:kv_offload_dropped_blocks_total",
    "stellarbyte:aborted_requests_total",
    "stellarbyte:rejected_requests_total",
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_per_pos_total",
}
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_params_max_tokens",
    "vllm:request_params_n",
    "vllm:request_num_preemptions",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:iteration_tokens_total",
    "stellarbyte:adapter_load_seconds",
    "vllm:lora_adapter_load_seconds",
    "stellarbyte:engine_step_seconds",
    "stellarbyte:http_stream_lag_seconds",
}
BY_ENGINE = {  # of several engines, each with the label `engine`
    "stellarbyte:engine_up",
    "stellarbyte:engine_requests_running",
    "stellarbyte:engine_requests_waiting",
    "stellarbyte:engine_kv_cache_usage_perc",
    "stellarbyte:engine_prompt_tokens_total",
    "stellarbyte:engine_generation_tokens_total",
}
SERIES = GAUGES | COUNTERS | {f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")}
LABELS = {
    "vllm:lora_requests_info": {"max_lora", "running_lora_adapters", "waiting_lora_adapters"},
    "vllm:num_requests_waiting_by_reason": {"reason"},
    "vllm:request_success_total": {"finished_reason"},
    "vllm:cache_config_info": {
        "block_size",
        "cache_dtype",
        "enable_prefix_caching",
        "gpu_memory_utilization",
        "num_gpu_blocks",
    },
    "vllm:lora_adapter_loaded": {"adapter_name", "level", "pinned", "rank"},
    "stellarbyte:adapter_resident": {"adapter", "tier"},
    "stellarbyte:adapter_tokens_total": {"adapter"},
    "stellarbyte:adapter_version_requests_total": {"adapter", "version"},
    "stellarbyte:adapter_version_tokens_total": {"adapter", "version"},
    "stellarbyte:aborted_requests_total": {"reason"},
    "stellarbyte:rejected_requests_total": {"reason"},
    "vllm:spec_decode_num_accepted_tokens_per_pos_total": {"position"},
    "vllm:kv_offload_store_bytes_total": {"tier"},
    "vllm:kv_offload_load_bytes_total": {"tier"},
    "stellarbyte:kv_offload_stored_blocks_total": {"tier"},
    "stellarbyte:kv_offload_loaded_blocks_total": {"tier"},
    **{name: {"engine"} for name in BY_ENGINE},
}
# An engine's state, and the labels of its cache, to render.
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
    offload=OffloadStats(
        queried_tokens=31,
        found_tokens=32,
        memory_stored_blocks=33,
        disk_stored_blocks=34,
        memory_loaded_blocks=35,
        disk_loaded_blocks=36,
        memory_stored_bytes=37,
        disk_stored_bytes=38,
        memory_loaded_bytes=39,
        disk_loaded_bytes=40,
        dropped_blocks=41,
    ),
)


CACHE = {
    "block_size": "16",
    "cache_dtype": "float32",
    "enable_prefix_caching": "True",
    "gpu_memory_utilization": "0.9",
    "num_gpu_blocks": "77",
}
EVERYWHERE = {"model_name", "instance", "job"}  # the last two are Prometheus' own


def check_exposition(text: str, *, with_adapters: bool) -> None:
    """AssertionError unless a scrape shows exactly these metrics, with their types and labels."""
    types = {name: kind for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)}
    expected = dict.fromkeys(GAUGES, "gauge") | dict.fromkeys(COUNTERS, "counter")
    assert types == expected | dict.fromkeys(HISTOGRAMS, "histogram")
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    of_adapters = {name for name, labels in LABELS.items() if labels & {"adapter", "adapter_name"}}
    assert {sample.name for sample in samples} == (SERIES if with_adapters else SERIES - of_adapters)
    for sample in samples:
        own = LABELS.get(sample.name, set()) | ({"le"} if sample.name.endswith("_bucket") else set())
        assert set(sample.labels) == own | {"model_name"}, sample.name


def series_in(expression: str) -> list[str]:
    """The names of the server's series in a PromQL expression."""
    return re.findall(r"\b(?:vllm|stellarbyte):\w+", expression)


def wrong_with(expression: str) -> list[str]:
    """What the server's metrics do not bear out: unknown names, rates of gauges and the like, labels nobody sets."""
    found = series_in(expression)
    wrong = [f"{name} is no metric" for name in found if name not in SERIES | BY_ENGINE]
    in_rates = set(series_in(" ".join(re.findall(r"\brate\(([^)]*)\)", expression))))
    gauges = GAUGES | {name for name in BY_ENGINE if not name.endswith("_total")}
    wrong += [f"{name} is a gauge" for name in in_rates & gauges]
    wrong += [f"{name} is a total, not a rate" for name in set(found) - in_rates - gauges]
    labels = EVERYWHERE.union(*(LABELS.get(name, set()) for name in found))
    if any(name.endswith("_bucket") for name in found):
        labels = labels | {"le"}
    used = {label.strip() for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(",")}
    used |= set(re.findall(r"[{,]\s*(\w+)\s*[=!]", expression))
    return wrong + [f"no metric of it has the label {label}" for label in used - labels]
