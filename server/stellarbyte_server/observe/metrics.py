"""The server's metrics in Prometheus' text format, under vLLM's names where it has them, for its dashboards.

Every HTTP process renders the engine's totals."""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from stellarbyte_server.observe.offload_metrics import offload_by_tier, offload_counts
from stellarbyte_server.observe.reasons import REASONS
from stellarbyte_server.observe.routing_metrics import adapter_residency, cache_config_info
from stellarbyte_server.protocol.histogram import Buckets
from stellarbyte_server.protocol.messages import AdapterList, EngineStats, EngineTotals


class _TotalsCollector(Collector):
    def __init__(self, totals: EngineTotals, model_name: str, cache_config: Mapping[str, str]) -> None:
        self._totals = totals
        self._model_name = model_name
        self._cache_config = cache_config

    def collect(self) -> Iterator[Metric]:
        yield from self._single_values()
        yield cache_config_info(self._cache_config, self._model_name)
        totals = self._totals
        rejected = dict.fromkeys(REASONS, 0) | totals.rejected
        for name, text, label, by_label in (
            ("vllm:request_success", "Requests completed.", "finished_reason", totals.finished),
            (
                "stellarbyte:aborted_requests",
                "Requests aborted before the end of their answer.",
                "reason",
                totals.aborted,
            ),
            ("stellarbyte:rejected_requests", "HTTP requests refused with an error.", "reason", rejected),
            (
                "vllm:spec_decode_num_accepted_tokens_per_pos",
                "Tokens of drafts accepted, by their place in the draft.",
                "position",
                {str(place): count for place, count in enumerate(totals.stats.accepted_by_place)},
            ),
            *offload_by_tier(totals.stats.offload),
        ):
            yield self._by_label(name, text, label, by_label)
        yield self._waiting()
        for name, text, buckets in (
            (
                "vllm:time_to_first_token_seconds",
                "Time from a request's arrival until its first token was ready to be written.",
                totals.first_token_s,
            ),
            ("vllm:inter_token_latency_seconds", "Time between two tokens of a request.", totals.between_tokens_s),
            ("vllm:e2e_request_latency_seconds", "Time from a request's arrival to its last token.", totals.request_s),
            ("vllm:request_queue_time_seconds", "Time in the engine's queue before the first step.", totals.queue_s),
            ("vllm:request_inference_time_seconds", "Time from the first step to the last token.", totals.inference_s),
            ("vllm:request_prefill_time_seconds", "Time from the first step to the first token.", totals.prefill_s),
            ("vllm:request_decode_time_seconds", "Time from the first token to the last.", totals.decode_s),
            ("vllm:request_params_max_tokens", "Maximum tokens of an answer.", totals.max_tokens),
            ("vllm:request_params_n", "Answers to one prompt.", totals.num_choices),
            ("vllm:request_num_preemptions", "Preemptions of completed requests.", totals.num_preemptions),
            ("vllm:request_prompt_tokens", "Prompt tokens of completed requests.", totals.prompt_tokens),
            ("vllm:request_generation_tokens", "Generated tokens of completed requests.", totals.generation_tokens),
            ("vllm:iteration_tokens_total", "Tokens of a step, including those of the cache.", totals.step_tokens),
            ("stellarbyte:engine_step_seconds", "Duration of a step.", totals.step_s),
            (
                "stellarbyte:http_stream_lag_seconds",
                "Time from the end of a step until its tokens were ready to be written.",
                totals.stream_lag_s,
            ),
        ):
            yield histogram(name, text, buckets, self._model_name)

    def _single_values(self) -> Iterator[Metric]:
        stats = self._totals.stats
        gauges = (
            ("vllm:num_requests_running", "Requests running in the engine.", stats.num_running),
            ("vllm:num_requests_waiting", "Requests waiting for their first step.", stats.num_waiting),
            ("vllm:kv_cache_usage_perc", "Share of cache blocks in use, 0 to 1.", stats.kv_cache_usage),
        )
        counters = (
            ("vllm:prompt_tokens", "Prompt tokens of started requests.", stats.prompt_tokens_total),
            ("vllm:generation_tokens", "Tokens generated.", stats.generation_tokens_total),
            (
                "vllm:num_preemptions",
                "Requests preempted for lack of cache memory and resumed.",
                stats.num_preemptions_total,
            ),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache.", stats.prefix_cache_queries_total),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the cache.", stats.prefix_cache_hits_total),
            *offload_counts(stats.offload),
            ("stellarbyte:evicted_tokens", "Tokens evicted from sliding contexts.", stats.evicted_tokens_total),
            ("vllm:spec_decode_num_drafts", "Drafts verified.", stats.drafts_total),
            ("vllm:spec_decode_num_draft_tokens", "Tokens of drafts.", stats.draft_tokens_total),
            ("vllm:spec_decode_num_accepted_tokens", "Tokens of drafts accepted.", stats.accepted_tokens_total),
            ("stellarbyte:kv_event_batches", "Batches of events of the KV cache.", stats.kv_event_batches_total),
            (
                "stellarbyte:kv_event_batches_dropped",
                "Batches of events that were not published, as the queue was full.",
                stats.kv_event_batches_dropped_total,
            ),
        )
        for family, rows in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, text, value in rows:
                metric = family(name, text, labels=["model_name"])
                metric.add_metric([self._model_name], value)
                yield metric

    def _waiting(self) -> Metric:
        stats = self._totals.stats
        num_deferred = min(stats.num_blocked, stats.num_waiting)
        metric = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Requests waiting for room (capacity), or for an adapter, a grammar or their key's limits (deferred).",
            labels=["model_name", "reason"],
        )
        for reason, count in (("capacity", stats.num_waiting - num_deferred), ("deferred", num_deferred)):
            metric.add_metric([self._model_name, reason], count)
        return metric

    def _by_label(self, name: str, text: str, label: str, by_label: Mapping[str, int]) -> Metric:
        metric = CounterMetricFamily(name, text, labels=["model_name", label])
        for value, count in sorted(by_label.items()):
            metric.add_metric([self._model_name, value], count)
        return metric


class _HealthCollector(Collector):
    """The engine's health, which the totals of a stalled engine cannot report."""

    def __init__(self, is_healthy: bool, model_name: str) -> None:
        self._is_healthy = is_healthy
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        healthy = GaugeMetricFamily(
            "stellarbyte:engine_healthy", "1 while /health answers 200, else 0.", labels=["model_name"]
        )
        healthy.add_metric([self._model_name], float(self._is_healthy))
        yield healthy


class _EngineCollector(Collector):
    """The state of each of several engines. All other metrics are of the whole."""

    def __init__(self, engines: Sequence[tuple[bool, EngineStats]], model_name: str) -> None:
        self._engines = engines
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        stats = [stats for _, stats in self._engines]
        for name, text, values in (
            ("up", "1 while the engine serves, else 0.", [serves for serves, _ in self._engines]),
            ("requests_running", "Requests running in the engine.", [each.num_running for each in stats]),
            ("requests_waiting", "Requests waiting in the engine.", [each.num_waiting for each in stats]),
            ("kv_cache_usage_perc", "Share of its cache blocks in use.", [each.kv_cache_usage for each in stats]),
        ):
            yield self._by_engine(GaugeMetricFamily, name, text, values)
        for name, text, values in (
            ("prompt_tokens", "Prompt tokens of started requests.", [each.prompt_tokens_total for each in stats]),
            ("generation_tokens", "Tokens generated.", [each.generation_tokens_total for each in stats]),
        ):
            yield self._by_engine(CounterMetricFamily, name, text, values)

    def _by_engine(
        self,
        family: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        text: str,
        values: Sequence[float],
    ) -> Metric:
        metric = family(f"stellarbyte:engine_{name}", text, labels=["model_name", "engine"])
        for index, value in enumerate(values):
            metric.add_metric([self._model_name, str(index)], float(value))
        return metric


class _AdapterCollector(Collector):
    """Metrics of adapters. Labels are names in the registry, whose number is bounded by the operator."""

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
            "1 for the fastest memory that holds the adapter.",
            labels=["model_name", "adapter", "tier"],
        )
        tokens = CounterMetricFamily(
            "stellarbyte:adapter_tokens", "Tokens generated with each adapter.", labels=["model_name", "adapter"]
        )
        version_labels = ["model_name", "adapter", "version"]
        by_version = (
            CounterMetricFamily(
                "stellarbyte:adapter_version_requests", "Requests of each version in use.", labels=version_labels
            ),
            CounterMetricFamily(
                "stellarbyte:adapter_version_tokens",
                "Tokens generated with each version in use.",
                labels=version_labels,
            ),
        )
        for card in cards:
            if card.content_hash and (card.is_current or card.share):
                labels = [self._model_name, card.name, card.content_hash[:12]]
                by_version[0].add_metric(labels, card.num_version_requests)
                by_version[1].add_metric(labels, card.num_version_tokens)
            if card.is_current:  # one version of each name
                resident.add_metric([self._model_name, card.name, tier_name(card.tier, self._device)], 1)
                tokens.add_metric([self._model_name, card.name], card.num_tokens)
        yield resident
        yield tokens
        yield from by_version
        yield from adapter_residency(self._adapters, self._model_name)
        for name in ("stellarbyte:adapter_load_seconds", "vllm:lora_adapter_load_seconds"):
            text = "Time to read, check and pack an adapter."
            yield histogram(name, text, self._adapters.load_seconds, self._model_name)


def histogram(name: str, text: str, buckets: Buckets, model_name: str) -> Metric:
    metric = HistogramMetricFamily(name, text, labels=["model_name"])
    bounds = [*map(str, buckets.bounds), "+Inf"]
    counts = itertools.accumulate(buckets.counts)
    metric.add_metric([model_name], list(zip(bounds, counts, strict=True)), buckets.total)
    return metric


def tier_name(tier: str, device: str) -> str:
    """A tier's name for users: a slot is in the device's memory."""
    return "gpu" if tier == "slot" and device == "cuda" else tier


def render_metrics(
    totals: EngineTotals,
    model_name: str,
    adapters: AdapterList | None,
    device: str,
    is_healthy: bool,
    cache_config: Mapping[str, str],
    engines: Sequence[tuple[bool, EngineStats]] = (),
) -> bytes:
    """The text of one scrape; without `adapters` (the engine does not answer) the last known counts.

    `engines`: of each whether it serves, and its statistics; of one alone nothing is shown.
    """
    registry = CollectorRegistry()
    registry.register(_HealthCollector(is_healthy, model_name))
    registry.register(_TotalsCollector(totals, model_name, cache_config))
    if len(engines) > 1:
        registry.register(_EngineCollector(engines, model_name))
    if adapters is not None:
        registry.register(_AdapterCollector(adapters, model_name, device))
    return generate_latest(registry)
