"""From settings to a running engine: loads the model, plans the cache's memory. Knows no sockets."""

import logging
import math
import os
import select
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from transformers import GenerationConfig

from server.engine.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, AdapterFolder
from server.engine.adapter_store import AdapterStore
from server.engine.adapters import Adapters, no_adapters
from server.engine.block_pool import BlockPool, CacheLayout
from server.engine.core import EngineCore
from server.engine.grammar import GrammarCompiler
from server.engine.messages import CallFailed, EngineInfo
from server.engine.model_runner import ModelRunner
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.settings import EngineSettings
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.checkpoint.demo import resolve_model
from stellarbyte.checkpoint.native import load_language_model, open_checkpoint, weights_hash
from stellarbyte.checkpoint.progress import ProgressBar
from stellarbyte.config import ByteModelConfig
from stellarbyte.kernels.served_model import ServedModel, TorchModel
from stellarbyte.lora.bank import LoraBank
from stellarbyte.model.decoder import ByteLanguageModel

logger = logging.getLogger("server.engine")

AUTO_CPU_SHARE = 0.25  # of the memory that is free when the engine starts
DEFAULT_SINK_TOKENS = 4  # StreamingLLM's: what a model trained without a window needs to go on beyond its context


class StartupError(ValueError):
    """The engine cannot start with these settings; str() is one sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """How much cache fits and what it holds."""

    layout: CacheLayout
    num_blocks: int
    bytes_per_block: int
    blocks_per_sequence: int  # most that one sequence of any length needs

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.layout.block_size

    @property
    def full_sequences(self) -> int:
        """Sequences of any length that have room at the same time."""
        return self.num_blocks // self.blocks_per_sequence


def build_core(settings: EngineSettings) -> tuple[EngineCore, EngineInfo]:
    """Load the model and make an engine for it.

    Raises:
        StartupError: a setting does not fit the model or the machine.
        stellarbyte.checkpoint.CheckpointError: the checkpoint is absent, damaged or unsupported.
    """
    device = _device(settings.device)
    torch.set_num_threads(_num_threads())
    path = resolve_model(settings.model, ProgressBar("Converting the demo model"))
    config, max_model_len = serving_config(open_checkpoint(path).config, settings)
    dtype = _dtype(settings.dtype, device)
    logger.info("loading %s on %s in %s", path, device.type, str(dtype).removeprefix("torch."))
    num_slots = settings.max_loras if settings.serves_adapters else 0
    bank = LoraBank(config, num_slots, settings.max_lora_rank if num_slots else 0, dtype, device)
    model = _served_model(
        load_language_model(path, dtype=dtype, device=device), config, bank, settings.quantization, dtype, device
    )
    adapters = _load_adapters(settings, bank)
    step_tokens, prefill_tokens = tokens_a_step(settings, device.type)
    plan = plan_cache(config, settings, dtype, step_tokens, _cache_budget(settings, config, step_tokens, device))
    logger.info(
        "KV cache: %d blocks of %d tokens (%d tokens, %.2f GiB); at full length, with %d tokens in view, %d sequences"
        " fit at once",
        plan.num_blocks,
        plan.layout.block_size,
        plan.num_tokens,
        plan.num_blocks * plan.bytes_per_block / 2**30,
        min(max_model_len, plan.layout.visible_tokens),
        plan.full_sequences,
    )
    cache = PagedKVCache(config, plan.num_blocks, plan.layout.block_size, dtype, device)
    limits = SchedulerLimits(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=step_tokens,
        max_prefill_tokens=prefill_tokens,
        max_model_len=max_model_len,
        max_queued_requests=settings.max_queued_requests,
        queue_timeout_s=settings.queue_timeout,
    )
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    eos_token_ids = _eos_token_ids(path, config)
    grammars = GrammarCompiler(tokenizer, eos_token_ids, config.vocab_size)
    grammars.prepare()
    core = EngineCore(
        Scheduler(
            limits,
            plan.layout,
            BlockPool(plan.num_blocks),
            prefix_caching=settings.enable_prefix_caching,
            adapters=adapters,
        ),
        ModelRunner(model, cache),
        tokenizer,
        eos_token_ids,
        adapters,
        grammars,
    )
    info = EngineInfo(
        model_path=str(path),
        max_model_len=max_model_len,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_blocks=plan.num_blocks,
        block_size=plan.layout.block_size,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        quantization=settings.quantization,
        weights_hash=weights_hash(path),
    )
    return core, info


def _served_model(
    model: ByteLanguageModel,
    config: ByteModelConfig,
    bank: LoraBank,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
) -> ServedModel:
    """The fastest form of the model for the device."""
    if device.type == "cpu" and dtype == torch.float32:
        from stellarbyte.kernels.cpu.model import CpuModel, fits  # numba is not needed on a GPU

        if fits(config):
            try:
                packed = CpuModel(model, config, bank, quantization=quantization, num_threads=torch.get_num_threads())
            except ValueError as error:
                raise StartupError(f"--quantization {quantization} does not fit this model: {error}.") from error
            logger.info("preparing the CPU kernels (the first start compiles them, which takes up to a minute)")
            packed.warm_up()
            return packed
    if quantization != "none":
        raise StartupError(
            f"--quantization {quantization} needs the CPU, float32 and heads of a multiple of 16 channels."
        )
    return TorchModel(model, config, bank)


def _load_adapters(settings: EngineSettings, bank: LoraBank) -> Adapters:
    """The registry, with the adapters of --lora-modules read and checked.

    Raises:
        StartupError: one of them is not there or cannot be used.
    """
    if not settings.serves_adapters:
        return no_adapters()
    folder = AdapterFolder(settings.adapter_dir, dict(settings.lora_modules))
    max_in_memory = 4 * settings.max_loras if settings.max_cpu_loras is None else settings.max_cpu_loras
    store = AdapterStore(bank)
    adapters = Adapters(folder, store, num_slots=bank.num_slots, max_in_memory=max_in_memory)
    for name, path in settings.lora_modules:
        files = folder.module(name)
        if files is None:
            raise StartupError(f"--lora-modules {name}: {path} holds no {CONFIG_FILE} and {WEIGHTS_FILE}.")
        adapters.start_load(name, name, files)
    num_loading = len(settings.lora_modules)
    while num_loading:
        select.select([store.wake_fd], [], [])
        for reply in adapters.collect():
            if isinstance(reply, CallFailed):
                raise StartupError(f"--lora-modules: {reply.message}")
            num_loading -= 1
    return adapters


def serving_config(config: ByteModelConfig, settings: EngineSettings) -> tuple[ByteModelConfig, int]:
    """The config to serve with, and the most tokens of a request that does not slide.

    Window and sinks are those of the settings, where given. Then no layer looks back further than the context less the
    sinks: within the context that changes nothing, for sinks and window together are all of it, and beyond it a
    request can slide.

    Raises:
        StartupError: --max-model-len is beyond the model, or --sink-tokens fill the context.
    """
    changes: dict[str, object] = {}
    if settings.sliding_window != "model":
        changes |= {"sliding_window": settings.sliding_window, "layer_types": None}
    asked = ByteModelConfig.from_dict(config.to_dict() | changes)
    max_model_len = asked.max_position_embeddings if settings.max_model_len is None else settings.max_model_len
    if max_model_len > asked.max_position_embeddings and None in asked.windows:
        raise StartupError(
            f"--max-model-len {max_model_len} exceeds the model's context of {asked.max_position_embeddings} tokens."
        )
    sink_tokens = settings.sink_tokens
    if sink_tokens is None:
        trained_with_window = any(config.windows) and any(asked.windows)
        sink_tokens = config.sink_tokens if trained_with_window else min(DEFAULT_SINK_TOKENS, max_model_len - 1)
    if sink_tokens >= max_model_len:
        raise StartupError(f"--sink-tokens {sink_tokens} leaves no room in a context of {max_model_len} tokens.")
    widest = max_model_len - sink_tokens
    changes |= {"sink_tokens": sink_tokens, "full_attention_window": widest}
    if asked.sliding_window is not None:
        changes["sliding_window"] = min(asked.sliding_window, widest)
    return ByteModelConfig.from_dict(config.to_dict() | changes), max_model_len


def tokens_a_step(settings: EngineSettings, device_type: str) -> tuple[int, int | None]:
    """Most tokens computed in one step, and most of them that prompts take while other requests generate.

    A GPU takes hundreds of tokens in the time of one. On a CPU the time of a step grows with its tokens from about 16
    on, so few of a prompt's tokens may go with those of running streams, or the streams would stutter.
    """
    default, prefill_default = (512, 32) if device_type == "cpu" else (2048, None)
    step_tokens = default if settings.max_num_batched_tokens is None else settings.max_num_batched_tokens
    return step_tokens, prefill_default if settings.max_prefill_tokens is None else settings.max_prefill_tokens


def plan_cache(
    config: ByteModelConfig, settings: EngineSettings, dtype: torch.dtype, step_tokens: int, budget: int
) -> CachePlan:
    """Divide `budget` bytes into blocks, for a config made by `serving_config`.

    Raises:
        StartupError: one sequence does not fit.
    """
    window = max(window for window in config.windows if window is not None)
    layout = CacheLayout(block_size=settings.block_size, window=window, sink_tokens=config.sink_tokens)
    bytes_per_block = PagedKVCache.bytes_per_token(config, dtype) * settings.block_size
    per_sequence = layout.steady_blocks
    most = settings.max_num_seqs * per_sequence + layout.blocks_for(step_tokens)
    if settings.enable_prefix_caching:
        most *= 2  # as much again for what no running sequence holds
    num_blocks = min(budget // bytes_per_block, most)
    if num_blocks < per_sequence:
        fitting = (num_blocks - layout.num_sink_blocks - 1) * settings.block_size + layout.sink_tokens
        advice = f" or --max-model-len {fitting}" if fitting > layout.sink_tokens else ""
        needed = per_sequence * bytes_per_block
        raise StartupError(
            f"The KV cache may take {budget} bytes, but one sequence at full length needs {needed}; "
            f"give --kv-cache-memory {needed}{advice}."
        )
    return CachePlan(
        layout=layout, num_blocks=num_blocks, bytes_per_block=bytes_per_block, blocks_per_sequence=per_sequence
    )


def _cache_budget(settings: EngineSettings, config: ByteModelConfig, step_tokens: int, device: torch.device) -> int:
    """Bytes the cache may take. On a GPU: what --gpu-memory-utilization leaves beside weights and activations."""
    if settings.kv_cache_memory is not None:
        return settings.kv_cache_memory
    if device.type == "cpu":
        return int(_available_memory() * AUTO_CPU_SHARE)
    free, total = torch.cuda.mem_get_info(device)
    activations = 4 * step_tokens * (8 * config.hidden_size + 3 * config.intermediate_size)
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
