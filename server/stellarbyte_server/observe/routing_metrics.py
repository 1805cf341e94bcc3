"""The metrics by which routers choose a server: which adapters it holds, and the shape of its KV cache.

Names and labels are vLLM's. Its level `gpu` is a slot, from which a request runs at once, on a CPU engine, too.
"""

from collections.abc import Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric

from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.protocol.messages import AdapterList, EngineInfo

_LEVELS = {"slot": "gpu", "cpu": "cpu"}  # by the tier of a card; those on disk are not loaded


def cache_config(info: EngineInfo, settings: EngineSettings) -> dict[str, str]:
    """The labels of vllm:cache_config_info."""
    return {
        "block_size": str(info.block_size),
        "cache_dtype": info.kv_cache_dtype,
        "enable_prefix_caching": str(settings.enable_prefix_caching),
        "gpu_memory_utilization": str(settings.gpu_memory_utilization),
        "num_gpu_blocks": str(info.num_blocks),
    }


def cache_config_info(labels: Mapping[str, str], model_name: str) -> Metric:
    metric = GaugeMetricFamily(
        "vllm:cache_config_info", "The KV cache's configuration as labels.", labels=["model_name", *labels]
    )
    metric.add_metric([model_name, *labels.values()], 1)
    return metric


def adapter_residency(adapters: AdapterList, model_name: str) -> Iterator[Metric]:
    """A series for each loaded adapter of the registry, which ends with it, and the counts of slots and memory."""
    loaded = GaugeMetricFamily(
        "vllm:lora_adapter_loaded",
        "1 for each adapter in memory: gpu, in a slot; cpu, in CPU memory only.",
        labels=["model_name", "adapter_name", "level", "pinned", "rank"],
    )
    for card in adapters.cards:
        if card.is_current and card.tier in _LEVELS:  # one version of each name
            pinned = "true" if card.pinned else "false"
            loaded.add_metric([model_name, card.name, _LEVELS[card.tier], pinned, str(card.rank)], 1)
    yield loaded
    for name, text, value in (
        ("vllm:num_gpu_loaded_lora_adapters", "Adapters in slots.", adapters.num_in_slots),
        (
            "vllm:num_cpu_loaded_lora_adapters",
            "Adapters in CPU memory, including those that are in slots, too.",
            adapters.num_in_memory,
        ),
        ("vllm:max_gpu_lora_adapters", "Slots for adapters.", adapters.num_slots),
    ):
        metric = GaugeMetricFamily(name, text, labels=["model_name"])
        metric.add_metric([model_name], value)
        yield metric
