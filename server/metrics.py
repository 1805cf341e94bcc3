"""The engine's state in Prometheus' text format, under vLLM's names, so that dashboards made for it work."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.messages import EngineStats


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


def render_metrics(stats: EngineStats, model_name: str) -> bytes:
    """The text of one scrape."""
    registry = CollectorRegistry()
    registry.register(_StatsCollector(stats, model_name))
    return generate_latest(registry)
