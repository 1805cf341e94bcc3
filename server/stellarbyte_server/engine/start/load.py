"""From settings to a running engine: loads the model, plans the cache's memory."""

import logging
import select
from collections.abc import Callable, Mapping
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
from stellarbyte_server.engine.drafts.drafts import Drafts
from stellarbyte_server.engine.events.form import CacheKind
from stellarbyte_server.engine.events.publisher import EventAddresses, EventPublisher
from stellarbyte_server.engine.grammar.compiler import GrammarCompiler
from stellarbyte_server.engine.run.adapter_store import AdapterStore, Bank
from stellarbyte_server.engine.run.executor import Executor
from stellarbyte_server.engine.run.host_executor import HostExecutor
from stellarbyte_server.engine.run.runner import PlanRunner
from stellarbyte_server.engine.schedule.limits import SchedulerLimits
from stellarbyte_server.engine.schedule.scheduler import Scheduler
from stellarbyte_server.engine.start.machine import (
    cache_dtype_of,
    cpu_cache_bytes,
    device_of,
    dtype_name,
    dtype_of,
    num_threads,
    require_triton,
)
from stellarbyte_server.engine.start.model_folder import ModelFolder, open_model_folder
from stellarbyte_server.engine.start.offload import CacheOrigin, make_offload
from stellarbyte_server.engine.start.ranks import load_ranks, make_bank, refuse_ranks
from stellarbyte_server.engine.start.serving_plan import (
    MAX_GPU_DRAFT_TOKENS,
    ServingPlan,
    StartupError,
    concurrency_of,
    drafts_by,
    plan_serving,
    serving_config,
    share_limits,
    tokens_a_step,
)
from stellarbyte_server.engine.state.block_pool import BlockPool
from stellarbyte_server.engine.state.cache_log import CacheLog
from stellarbyte_server.protocol.adapter_versions import SetVersions
from stellarbyte_server.protocol.messages import AdapterLoaded, CallFailed, EngineInfo

logger = logging.getLogger("server.engine")

# On two cores a chunk of the demo model takes twice as long after 1,000 tokens of context, three times after 2,000.
CONTEXT_LIKE_A_TOKEN = 1000


def build_core(settings: EngineSettings) -> tuple[EngineCore, EngineInfo]:
    """Load the model and make an engine for it.

    Raises:
        StartupError: a setting does not fit the model or the machine.
        stellarbyte.checkpoint.CheckpointError: the checkpoint is absent, damaged or unsupported.
    """
    device = device_of(settings.device)
    has_drafts = drafts_by(settings, device.type)
    torch.set_num_threads(num_threads(settings))
    is_dummy = settings.load_format == "dummy"
    path = resolve_model(settings.model, ProgressBar("Converting"), needs_weights=not is_dummy)
    folder = open_model_folder(path, is_dummy=is_dummy)
    config = folder.config
    serving_config(config, settings)  # refuses what cannot be served before the weights are read
    if settings.tensor_parallel_size > 1:
        refuse_ranks(settings, config, device)
    dtype = dtype_of(settings.dtype, device)
    logger.info("loading %s on %s in %s", path, device.type, dtype_name(dtype))
    cache_dtype = cache_dtype_of(settings, dtype, device)
    quantization = settings.quantization
    if settings.tensor_parallel_size > 1:
        adapters, executor, serving, quantization = _make_ranks_executor(settings, folder, dtype, device)
    elif device.type == "cpu":
        bank = make_bank(settings, config, dtype, device)
        kernels = _has_cpu_kernels(config, dtype)
        model, kept = folder.kept_model(dtype, device) if kernels else (folder.language_model(dtype, device), {})
        served = _cpu_model(model, config, bank, settings.quantization, kept, deterministic=settings.deterministic)
        quantization = served.quantization
        adapters = _load_adapters(settings, bank, served.weight)  # fails before the minute of compiling
        _compile_kernels(served)
        executor, serving = _make_cpu_executor(settings, served, config, cache_dtype)
    else:
        bank = make_bank(settings, config, dtype, device)
        model, kept = folder.kept_model(dtype, device)
        adapters, executor, serving, quantization = _make_gpu_executor(settings, model, kept, config, bank, cache_dtype)
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
        max_draft_tokens=None if device.type == "cpu" else MAX_GPU_DRAFT_TOKENS,
        max_prefill_tokens=prefill_tokens,
        context_like_a_token=CONTEXT_LIKE_A_TOKEN if device.type == "cpu" else None,
        max_model_len=max_model_len,
        max_queued_requests=settings.max_queued_requests,
        queue_timeout_s=settings.queue_timeout,
        shares=share_limits(device.type),
    )
    layout = plan.layout
    has_window = layout.window is not None and layout.window + layout.sink_tokens < max_model_len
    kind = CacheKind(medium="CPU" if device.type == "cpu" else "GPU", window=layout.window if has_window else None)
    log, events = _make_events(settings, kind)
    processor = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else torch.cuda.get_device_name()
    origin = CacheOrigin(
        weights_hash=folder.weights_hash(), quantization=quantization, dtype=dtype, device=device.type,
        processor=processor, deterministic=settings.deterministic,
    )  # fmt: skip
    offload = make_offload(settings, origin, serving, executor.cache)
    tokenizer, eos_token_ids = folder.tokenizer(), folder.eos_token_ids()
    grammars = GrammarCompiler(tokenizer, eos_token_ids, config.vocab_size)
    grammars.prepare()
    drafts = Drafts(runs_ahead=executor.num_steps_ahead > 0) if has_drafts else None
    logger.info("speculative decoding: %s", "off" if drafts is None else "ngram")
    core = EngineCore(
        Scheduler(
            limits,
            plan.layout,
            BlockPool(plan.num_blocks, log, offload),
            prefix_caching=settings.enable_prefix_caching,
            adapters=adapters,
        ),
        PlanRunner(executor),
        tokenizer,
        eos_token_ids,
        adapters,
        grammars,
        events,
        drafts,
        offload,
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
        processor=processor,
        dtype=dtype_name(dtype),
        quantization=quantization,
        kv_cache_dtype=dtype_name(cache_dtype),
        deterministic=settings.deterministic,
        weights_hash=origin.weights_hash,
        speculative="off" if drafts is None else "ngram",
    )
    return core, info


def _make_ranks_executor(
    settings: EngineSettings, folder: ModelFolder, dtype: torch.dtype, device: torch.device
) -> tuple[Adapters, Executor, ServingPlan, str]:
    """And the quantization of the weights."""
    ranks = load_ranks(settings, folder, dtype, device)
    try:
        adapters = _load_adapters(settings, ranks.bank, ranks.own.weight)
        return adapters, *ranks.serve(), ranks.own.quantization
    except Exception:
        ranks.others.close()
        raise


def _make_events(settings: EngineSettings, kind: CacheKind) -> tuple[CacheLog | None, EventPublisher | None]:
    """The log of the cache and what publishes it; EventsAddressError if an address is in use."""
    if settings.kv_events is None:
        return None, None
    addresses = EventAddresses(
        publish=settings.kv_events,
        replay=settings.kv_events_replay,
        topic=settings.kv_events_topic,
        rank=settings.engine_index,
    )
    log = CacheLog()
    events = EventPublisher(log, kind, addresses)
    events.start()
    return log, events


def _make_cpu_executor(
    settings: EngineSettings, served: ServedModel, config: ByteModelConfig, cache_dtype: torch.dtype
) -> tuple[Executor, ServingPlan]:
    step_tokens, _ = tokens_a_step(settings, "cpu")
    plan = plan_serving(config, settings, cache_dtype, step_tokens, cpu_cache_bytes(settings))
    served, num_blocks, layout = served.with_windows_of(plan.config), plan.cache.num_blocks, plan.cache.layout
    cache = PagedKVCache(plan.config, num_blocks, layout.block_size, cache_dtype, torch.device("cpu"))
    return HostExecutor(served, cache, layout), plan


def _make_gpu_executor(
    settings: EngineSettings,
    model: ByteLanguageModel,
    kept: Mapping[str, QuantizedMatrix],
    config: ByteModelConfig,
    bank: LoraBank,
    cache_dtype: torch.dtype,
) -> tuple[Adapters, Executor, ServingPlan, str]:
    """And the quantization of the weights."""
    require_triton()
    from stellarbyte.backends.gpu.model import TritonModel
    from stellarbyte_server.engine.start.gpu_engine import GpuStart  # Triton is not needed on a CPU

    try:
        packed = TritonModel(
            model, config, bank, quantization=settings.quantization, is_invariant=settings.deterministic, kept=kept
        )
    except ValueError as error:
        raise StartupError(f"--device cuda cannot serve this model: {str(error).removesuffix('.')}.") from error
    if kept:
        _log_form(packed.quantization, "GPU")
    adapters = _load_adapters(settings, bank, packed.weight)  # fails before kernels are compiled
    start = GpuStart(packed, settings, cache_dtype)
    serving = start.plan(start.cache_bytes())
    executor = start.executor(serving.max_model_len, serving.cache.num_blocks)
    return adapters, executor, serving, packed.quantization


def _has_cpu_kernels(config: ByteModelConfig, dtype: torch.dtype) -> bool:
    from stellarbyte.backends.cpu_model import fits  # numba is not needed on a GPU

    return dtype == torch.float32 and fits(config)


def _cpu_model(
    model: ByteLanguageModel,
    config: ByteModelConfig,
    bank: LoraBank,
    quantization: str,
    kept: Mapping[str, QuantizedMatrix] = MappingProxyType({}),
    *,
    deterministic: bool = False,
) -> ServedModel:
    """The fastest form of the model for a CPU; `kept` as in `CpuModel`."""
    if quantization == "fp8":
        raise StartupError("--quantization fp8 needs --device cuda; a CPU takes int8 and int4.")
    if _has_cpu_kernels(config, bank.dtype):
        from stellarbyte.backends.cpu_model import CpuModel

        threads = torch.get_num_threads()
        try:
            served = CpuModel(
                model, config, bank, quantization=quantization, num_threads=threads, is_invariant=deterministic,
                kept=kept,
            )  # fmt: skip
        except ValueError as error:
            raise StartupError(f"--quantization {quantization} does not fit this model: {error}.") from error
        if kept:
            _log_form(served.quantization, "CPU")
        return served
    if quantization != "none" or deterministic:
        flag = f"--quantization {quantization}" if quantization != "none" else "--deterministic"
        raise StartupError(
            f"{flag} on a CPU needs float32 and a model that its kernels support: heads of a"
            " multiple of 16 channels, no router_top_p."
        )
    return TorchModel(model, config, bank)


def _log_form(quantization: str, device: str) -> None:
    """How the matrices that a checkpoint keeps quantized are served."""
    if quantization == "none":
        logger.info("weights are dequantized: the %s kernels do not take them as the checkpoint keeps them", device)
    else:
        logger.info("weights are in %s", quantization)


def _compile_kernels(served: ServedModel) -> None:
    """Of a CPU; plain torch has none."""
    from stellarbyte.backends.cpu_model import CpuModel  # numba is not needed on a GPU

    if isinstance(served, CpuModel):
        logger.info("preparing the CPU kernels (the first start compiles them, which takes a minute or two)")
        served.warm_up()


def _load_adapters(settings: EngineSettings, bank: Bank, weight_of: Callable[[str], torch.Tensor] | None) -> Adapters:
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
        select.select([store.wake_up.fd], [], [])
        for reply in adapters.collect():
            if isinstance(reply, CallFailed):
                raise StartupError(f"--lora-modules: {reply.message}")
            if isinstance(reply, AdapterLoaded):
                adapters.set_versions(SetVersions("", reply.card.name, reply.card.content_hash))
                num_loading -= 1
    return adapters
