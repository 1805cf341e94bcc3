"""From settings to a running engine: loads the model, plans the cache's memory."""

import importlib.util
import logging
import math
import os
import select
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from stellarbyte.backends.torch_model import ServedModel, TorchModel
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.checkpoint.progress import ProgressBar
from stellarbyte.checkpoint.quantized.matrix import QuantizedMatrix
from stellarbyte.checkpoint.source import resolve_model
from stellarbyte.config import ByteModelConfig
from stellarbyte.lora.bank import LoraBank
from stellarbyte.model.decoder import ByteLanguageModel
from stellarbyte.user_cache import adapter_cache
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.adapters.absent import no_adapters
from stellarbyte_server.engine.adapters.folder import CONFIG_FILE, WEIGHTS_FILE, AdapterFolder
from stellarbyte_server.engine.adapters.registry import Adapters
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.grammar.compiler import GrammarCompiler
from stellarbyte_server.engine.run.adapter_store import AdapterStore
from stellarbyte_server.engine.run.executor import Executor
from stellarbyte_server.engine.run.host_executor import HostExecutor
from stellarbyte_server.engine.run.runner import PlanRunner
from stellarbyte_server.engine.schedule.limits import SchedulerLimits
from stellarbyte_server.engine.schedule.scheduler import Scheduler
from stellarbyte_server.engine.start.model_folder import open_model_folder
from stellarbyte_server.engine.start.serving_plan import (
    ServingPlan,
    StartupError,
    concurrency_of,
    plan_serving,
    serving_config,
    share_limits,
    tokens_a_step,
)
from stellarbyte_server.engine.state.block_pool import BlockPool
from stellarbyte_server.protocol.messages import CallFailed, EngineInfo

logger = logging.getLogger("server.engine")

# On two cores a chunk of the demo model takes twice as long after 1,000 tokens of context, three times after 2,000.
CONTEXT_LIKE_A_TOKEN = 1000
AUTO_CPU_SHARE = 0.25  # of the memory that is free when the engine starts


def build_core(settings: EngineSettings) -> tuple[EngineCore, EngineInfo]:
    """Load the model and make an engine for it.

    Raises:
        StartupError: a setting does not fit the model or the machine.
        stellarbyte.checkpoint.CheckpointError: the checkpoint is absent, damaged or unsupported.
    """
    device = _device(settings.device)
    torch.set_num_threads(_num_threads())
    is_dummy = settings.load_format == "dummy"
    path = resolve_model(settings.model, ProgressBar("Converting"), needs_weights=not is_dummy)
    folder = open_model_folder(path, is_dummy=is_dummy)
    config = folder.config
    serving_config(config, settings)  # refuses what cannot be served before the weights are read
    dtype = _dtype(settings.dtype, device)
    logger.info("loading %s on %s in %s", path, device.type, dtype_name(dtype))
    num_slots = settings.max_loras if settings.serves_adapters else 0
    bank = LoraBank(config, num_slots, settings.max_lora_rank if num_slots else 0, dtype, device)
    cache_dtype = _cache_dtype(settings, dtype, device)
    quantization = settings.quantization
    if device.type == "cpu":
        kernels = _has_cpu_kernels(config, dtype)
        model, kept = folder.kept_model(dtype, device) if kernels else (folder.language_model(dtype, device), {})
        served = _cpu_model(model, config, bank, settings.quantization, kept)
        quantization = served.quantization
        adapters = _load_adapters(settings, bank, served.weight)  # fails before the minute of compiling
        _compile_kernels(served)
        executor, serving = _make_cpu_executor(settings, served, config, cache_dtype)
    else:
        model = folder.language_model(dtype, device)
        adapters, executor, serving = _make_gpu_executor(settings, model, config, bank, cache_dtype)
    plan, max_model_len = serving.cache, serving.max_model_len
    step_tokens, prefill_tokens = tokens_a_step(settings, device.type)
    max_num_seqs = concurrency_of(settings, device.type)
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
    limits = SchedulerLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=step_tokens,
        max_prefill_tokens=prefill_tokens,
        context_like_a_token=CONTEXT_LIKE_A_TOKEN if device.type == "cpu" else None,
        max_model_len=max_model_len,
        max_queued_requests=settings.max_queued_requests,
        queue_timeout_s=settings.queue_timeout,
        shares=share_limits(device.type),
    )
    tokenizer, eos_token_ids = folder.tokenizer(), folder.eos_token_ids()
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
        PlanRunner(executor),
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
        max_num_seqs=max_num_seqs,
        device=device.type,
        dtype=dtype_name(dtype),
        quantization=quantization,
        kv_cache_dtype=dtype_name(cache_dtype),
        weights_hash=folder.weights_hash(),
    )
    return core, info


def _make_cpu_executor(
    settings: EngineSettings, served: ServedModel, config: ByteModelConfig, cache_dtype: torch.dtype
) -> tuple[Executor, ServingPlan]:
    step_tokens, _ = tokens_a_step(settings, "cpu")
    budget = settings.kv_cache_memory
    if budget is None:
        budget = int(_available_memory() * AUTO_CPU_SHARE)
    plan = plan_serving(config, settings, cache_dtype, step_tokens, budget)
    served, num_blocks, layout = served.with_windows_of(plan.config), plan.cache.num_blocks, plan.cache.layout
    cache = PagedKVCache(plan.config, num_blocks, layout.block_size, cache_dtype, torch.device("cpu"))
    return HostExecutor(served, cache, layout), plan


def _make_gpu_executor(
    settings: EngineSettings,
    model: ByteLanguageModel,
    config: ByteModelConfig,
    bank: LoraBank,
    cache_dtype: torch.dtype,
) -> tuple[Adapters, Executor, ServingPlan]:
    _require_triton()
    from stellarbyte.backends.gpu.model import TritonModel
    from stellarbyte_server.engine.run.slot_executor import SlotExecutor
    from stellarbyte_server.engine.start.gpu_engine import make_gpu_executor  # Triton is not needed on a CPU

    if settings.quantization == "int4":
        raise StartupError("--quantization int4 needs --device cpu; a GPU takes int8 and fp8.")
    step_tokens, _ = tokens_a_step(settings, "cuda")
    ahead = SlotExecutor.num_steps_ahead

    def plan_for(budget: int) -> ServingPlan:
        return plan_serving(
            config, settings, cache_dtype, step_tokens, budget, device_type="cuda", num_steps_ahead=ahead
        )

    try:
        packed = TritonModel(model, config, bank, quantization=settings.quantization)
    except ValueError as error:
        raise StartupError(f"--device cuda cannot serve this model: {error}.") from error
    adapters = _load_adapters(settings, bank, packed.weight)  # fails before kernels are compiled
    executor, serving = make_gpu_executor(
        packed,
        plan_for,
        cache_dtype=cache_dtype,
        max_num_seqs=concurrency_of(settings, "cuda"),
        step_tokens=step_tokens,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        kv_cache_memory=settings.kv_cache_memory,
    )
    return adapters, executor, serving


def _require_triton() -> None:
    """StartupError where the kernels cannot be compiled."""
    if importlib.util.find_spec("triton") is None:
        raise StartupError("--device cuda needs the package triton, which torch's CUDA builds for Linux bring along.")
    compilers = [name for name in (os.environ.get("CC"), "gcc", "clang", "cc") if name and shutil.which(name)]
    if not compilers:
        raise StartupError(
            "--device cuda needs a C compiler, with which Triton builds the launchers of its kernels: install gcc, or"
            " give the variable CC."
        )


def _has_cpu_kernels(config: ByteModelConfig, dtype: torch.dtype) -> bool:
    from stellarbyte.backends.cpu_model import fits  # numba is not needed on a GPU

    return dtype == torch.float32 and fits(config)


def _cpu_model(
    model: ByteLanguageModel,
    config: ByteModelConfig,
    bank: LoraBank,
    quantization: str,
    kept: Mapping[str, QuantizedMatrix] = MappingProxyType({}),
) -> ServedModel:
    """The fastest form of the model for a CPU; `kept` as in `CpuModel`."""
    if quantization == "fp8":
        raise StartupError("--quantization fp8 needs --device cuda; a CPU takes int8 and int4.")
    if _has_cpu_kernels(config, bank.dtype):
        from stellarbyte.backends.cpu_model import CpuModel

        threads = torch.get_num_threads()
        try:
            served = CpuModel(model, config, bank, quantization=quantization, num_threads=threads, kept=kept)
        except ValueError as error:
            raise StartupError(f"--quantization {quantization} does not fit this model: {error}.") from error
        if kept:
            is_kept = {"none": "dequantized: the CPU kernels do not take them as the checkpoint keeps them"}
            logger.info("weights are %s", is_kept.get(served.quantization, f"in {served.quantization}"))
        return served
    if quantization != "none":
        raise StartupError(
            f"--quantization {quantization} on a CPU needs float32 and a model that its kernels support: heads of a"
            " multiple of 16 channels, no router_top_p."
        )
    return TorchModel(model, config, bank)


def _compile_kernels(served: ServedModel) -> None:
    """Of a CPU; plain torch has none."""
    from stellarbyte.backends.cpu_model import CpuModel  # numba is not needed on a GPU

    if isinstance(served, CpuModel):
        logger.info("preparing the CPU kernels (the first start compiles them, which takes up to a minute)")
        served.warm_up()


def _load_adapters(settings: EngineSettings, bank: LoraBank, weight_of: Callable[[str], torch.Tensor]) -> Adapters:
    """The registry, with the adapters of --lora-modules read and checked; DoRA needs the weights as they are served.

    Raises:
        StartupError: one of them is not there or cannot be used.
    """
    if not settings.serves_adapters:
        return no_adapters()
    fetched = adapter_cache() if settings.adapter_source else None
    folder = AdapterFolder(settings.adapter_dir, dict(settings.lora_modules), fetched, settings.tuned_adapters)
    max_in_memory = 4 * settings.max_loras if settings.max_cpu_loras is None else settings.max_cpu_loras
    store = AdapterStore(bank, weight_of)
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


def dtype_name(dtype: torch.dtype) -> str:
    """As users write it: float32, bfloat16, fp8."""
    return "fp8" if dtype == torch.float8_e4m3fn else str(dtype).removeprefix("torch.")


def _cache_dtype(settings: EngineSettings, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    if settings.kv_cache_dtype == "auto":
        return dtype
    if device.type == "cpu":
        raise StartupError("--kv-cache-dtype fp8 needs --device cuda; a CPU's cache is as --dtype.")
    return torch.float8_e4m3fn


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
