"""From settings to a running engine: loads the model, plans the cache's memory. Knows no sockets."""

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from transformers import GenerationConfig

from server.engine.block_pool import BlockPool, CacheLayout
from server.engine.core import EngineCore
from server.engine.messages import EngineInfo
from server.engine.model_runner import ModelRunner
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.settings import EngineSettings
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.checkpoint.demo import resolve_model
from stellarbyte.checkpoint.native import load_language_model, open_checkpoint, weights_hash
from stellarbyte.checkpoint.progress import ProgressBar
from stellarbyte.config import ByteModelConfig

logger = logging.getLogger("server.engine")

AUTO_CPU_SHARE = 0.25  # of the memory that is free when the engine starts


class StartupError(ValueError):
    """The engine cannot start with these settings; str() is one sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """How much cache fits and what it holds."""

    layout: CacheLayout
    num_blocks: int
    bytes_per_block: int
    max_model_len: int
    full_sequences: int  # of max_model_len tokens, at the same time


def build_core(settings: EngineSettings) -> tuple[EngineCore, EngineInfo]:
    """Load the model and make an engine for it.

    Raises:
        StartupError: a setting does not fit the model or the machine.
        stellarbyte.checkpoint.CheckpointError: the checkpoint is absent, damaged or unsupported.
    """
    device = _device(settings.device)
    torch.set_num_threads(_num_threads())
    path = resolve_model(settings.model, ProgressBar("Converting the demo model"))
    config = serving_config(open_checkpoint(path).config, settings)
    dtype = _dtype(settings.dtype, device)
    logger.info("loading %s on %s in %s", path, device.type, str(dtype).removeprefix("torch."))
    model = load_language_model(path, dtype=dtype, device=device)
    plan = plan_cache(config, settings, dtype, _cache_budget(settings, config, device))
    logger.info(
        "cache: %d blocks of %d tokens (%.1f GiB), at least %d sequences of %d tokens",
        plan.num_blocks,
        plan.layout.block_size,
        plan.num_blocks * plan.bytes_per_block / 2**30,
        plan.full_sequences,
        plan.max_model_len,
    )
    cache = PagedKVCache(config, plan.num_blocks, plan.layout.block_size, dtype, device)
    limits = SchedulerLimits(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
    )
    core = EngineCore(
        Scheduler(limits, plan.layout, BlockPool(plan.num_blocks)),
        ModelRunner(model, cache, config),
        tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")),
        _eos_token_ids(path, config),
    )
    info = EngineInfo(
        model_path=str(path),
        max_model_len=plan.max_model_len,
        vocab_size=config.vocab_size,
        num_blocks=plan.num_blocks,
        block_size=plan.layout.block_size,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        weights_hash=weights_hash(path),
    )
    return core, info


def serving_config(config: ByteModelConfig, settings: EngineSettings) -> ByteModelConfig:
    """The checkpoint's config with the window and sinks of the settings in place of its own, where they are given."""
    changes: dict[str, object] = {}
    if settings.sliding_window != "model":
        changes |= {"sliding_window": settings.sliding_window, "layer_types": None}
    if settings.sink_tokens is not None:
        changes["sink_tokens"] = settings.sink_tokens
    served = ByteModelConfig.from_dict(config.to_dict() | changes) if changes else config
    if served.sink_tokens and not any(served.windows):
        raise StartupError("--sink-tokens needs a window: the model has none, so give --sliding-window too.")
    return served


def plan_cache(config: ByteModelConfig, settings: EngineSettings, dtype: torch.dtype, budget: int) -> CachePlan:
    """Divide `budget` bytes into blocks.

    Raises:
        StartupError: --max-model-len is beyond the model, or one sequence of that length does not fit.
    """
    has_window = any(config.windows)
    every_layer_has = all(window is not None for window in config.windows)
    max_model_len = settings.max_model_len
    if max_model_len is None:
        max_model_len = config.max_position_embeddings
    elif max_model_len > config.max_position_embeddings and not every_layer_has:
        raise StartupError(
            f"--max-model-len {max_model_len} exceeds the model's context of {config.max_position_embeddings} tokens."
        )
    layout = CacheLayout(
        block_size=settings.block_size,
        window=config.sliding_window if every_layer_has else None,
        sink_tokens=config.sink_tokens if has_window else 0,
    )
    bytes_per_block = PagedKVCache.bytes_per_token(config, dtype) * settings.block_size
    per_sequence = layout.peak_blocks(max_model_len, settings.max_num_batched_tokens)
    num_blocks = min(budget // bytes_per_block, settings.max_num_seqs * per_sequence)
    if num_blocks < per_sequence:
        fitting = (num_blocks - layout.num_sink_blocks) * settings.block_size + layout.sink_tokens
        advice = f" or --max-model-len {fitting}" if layout.window is None and fitting > 0 else ""
        raise StartupError(
            f"The cache may take {budget} bytes but one sequence of {max_model_len} tokens needs "
            f"{per_sequence * bytes_per_block}; give --kv-cache-memory {per_sequence * bytes_per_block}{advice}."
        )
    return CachePlan(
        layout=layout,
        num_blocks=num_blocks,
        bytes_per_block=bytes_per_block,
        max_model_len=max_model_len,
        full_sequences=num_blocks // per_sequence,
    )


def _cache_budget(settings: EngineSettings, config: ByteModelConfig, device: torch.device) -> int:
    """Bytes the cache may take. On a GPU: what --gpu-memory-utilization leaves beside weights and activations."""
    if settings.kv_cache_memory is not None:
        return settings.kv_cache_memory
    if device.type == "cpu":
        return int(_available_memory() * AUTO_CPU_SHARE)
    free, total = torch.cuda.mem_get_info(device)
    activations = 4 * settings.max_num_batched_tokens * (8 * config.hidden_size + 3 * config.intermediate_size)
    activations += 4 * 4 * settings.max_num_seqs * config.vocab_size
    return max(0, int(total * settings.gpu_memory_utilization) - (total - free) - activations)


def _available_memory() -> int:
    """Bytes that can be used without swapping, of the machine and of the control group (containers)."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # counts memory that caches would give back
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (allowed := limit.read_text().strip()) != "max":
        available = min(available, int(allowed) - int(used.read_text()))
    return max(0, available)


def _num_threads() -> int:
    """Cores for torch: all this process may use, less one for HTTP where there are many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if cores <= 2 else math.ceil(cores * 0.9) - 1 or 1


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise StartupError("--device cuda: torch finds no CUDA device here.")
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _eos_token_ids(path: Path, config: ByteModelConfig) -> frozenset[int]:
    """The tokens that end an answer: generation_config.json's, else the model config's."""
    if (path / "generation_config.json").is_file():
        ids = GenerationConfig.from_pretrained(path).eos_token_id
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset(config.eos_token_ids)
