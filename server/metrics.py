"""The engine's state in Prometheus' text format, under vLLM's names, so that dashboards made for it work."""

import itertools
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.messages import AdapterList, EngineStats


class _StatsCollector(Collector):
    def __init__(self, stats: EngineStats, model_name: str) -> None:
        self._stats = stats
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        gauges = (
            ("vllm:num_requests_running", "Requests the engine is working on.", stats.num_running),
            ("vllm:num_requests_waiting", "Requests waiting for their first step.", stats.num_waiting),
            ("vllm:kv_cache_usage_perc", "Share of cache blocks in use, 0 to 1.", stats.kv_cache_usage),
        )
        counters = (
            ("vllm:prompt_tokens", "Prompt tokens of requests that were started.", stats.prompt_tokens_total),
            ("vllm:generation_tokens", "Tokens generated.", stats.generation_tokens_total),
            ("vllm:num_preemptions", "Requests stopped for want of memory and run again.", stats.num_preemptions_total),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache.", stats.prefix_cache_queries_total),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the cache.", stats.prefix_cache_hits_total),
            (
                "stellarbyte:evicted_tokens",
                "Tokens that have gone out of sight.",
                stats.evicted_tokens_total,
            ),
        )
        for family, rows in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, text, value in rows:
                metric = family(name, text, labels=["model_name"])
                metric.add_metric([self._model_name], value)
                yield metric


class _AdapterCollector(Collector):
    """Labels are names from the registry, whose number the operator bounds."""

    def __init__(self, adapters: AdapterList, model_name: str, device: str) -> None:
        self._adapters = adapters
        self._model_name = model_name
        self._device = device

    def collect(self) -> Iterator[Metric]:
        cards = self._adapters.cards
        running = ",".join(sorted({card.name for card in cards if card.num_running}))
        waiting = ",".join(sorted({card.name for card in cards if card.num_waiting}))
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and of waiting requests; the value is the time of the scrape.",
            labels=["model_name", "max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        info.add_metric([self._model_name, str(self._adapters.num_slots), running, waiting], time.time())
        yield info

        resident = GaugeMetricFamily(
            "stellarbyte:adapter_resident",
            "1 for the fastest memory each adapter lies in.",
            labels=["model_name", "adapter", "tier"],
        )
        tokens = CounterMetricFamily(
            "stellarbyte:adapter_tokens", "Tokens generated with each adapter.", labels=["model_name", "adapter"]
        )
        for card in cards:
            if card.is_current:  # of a name's versions one
                resident.add_metric([self._model_name, card.name, tier_name(card.tier, self._device)], 1)
                tokens.add_metric([self._model_name, card.name], card.num_tokens)
        yield resident
        yield tokens

        seconds = HistogramMetricFamily(
            "stellarbyte:adapter_load_seconds",
            "Time to read, check and pack an adapter.",
            labels=["model_name"],
        )
        times = self._adapters.load_seconds
        counts = itertools.accumulate(times.counts)
        bounds = [*map(str, times.bounds), "+Inf"]
        seconds.add_metric([self._model_name], list(zip(bounds, counts, strict=True)), times.total)
        yield seconds


def tier_name(tier: str, device: str) -> str:
    """A tier as users know it: a slot lies in the device's memory."""
    return "gpu" if tier == "slot" and device == "cuda" else tier


def render_metrics(stats: EngineStats, model_name: str, adapters: AdapterList | None, device: str) -> bytes:
    """The text of one scrape; without `adapters` (the engine does not answer) those of the engine's last state."""
    registry = CollectorRegistry()
    registry.register(_StatsCollector(stats, model_name))
    if adapters is not None:
        registry.register(_AdapterCollector(adapters, model_name, device))
    return generate_latest(registry)
