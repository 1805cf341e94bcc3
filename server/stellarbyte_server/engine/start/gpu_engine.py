"""From a model on a GPU to an executor: measures what steps take of its memory, and gives the rest to the cache."""

import dataclasses
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from stellarbyte.backends.gpu.model import TritonModel
from stellarbyte.backends.gpu.preparation import CaptureOrder, Preparation, first_programs
from stellarbyte.backends.gpu.prompts import ODD_TOKENS
from stellarbyte.backends.gpu.steps import Decoding, Prefill, Steps
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.run.slot_executor import SlotExecutor
from stellarbyte_server.engine.start.serving_plan import (
    MAX_GPU_DRAFT_TOKENS,
    ServingPlan,
    concurrency_of,
    drafts_by,
    layout_of,
    plan_serving,
    serving_config,
    tokens_a_step,
)
from stellarbyte_server.engine.state.block_pool import CacheLayout

logger = logging.getLogger("server.engine")

# For what is not seen by measuring: captured graphs, libraries' workspaces of other shapes, fragments.
RESERVE_BYTES = 512 * 2**20
NUM_COMPILERS = 4


class GpuStart:
    """A loaded model that does not serve yet. Compiles the kernels that its first answers need.

    From its creation on the calling thread, which is to be the engine's, works on a CUDA stream of its own.

    Args:
        model: or the part of a rank, which needs no other rank for what is done here.
        cache_dtype: the model's, or torch.float8_e4m3fn.
    """

    def __init__(self, model: TritonModel, settings: EngineSettings, cache_dtype: torch.dtype) -> None:
        torch.cuda.synchronize()
        torch.cuda.set_stream(torch.cuda.Stream(priority=-1))  # before that of the thread which prepares kernels
        self._model = model
        self._settings = settings
        self._cache_dtype = cache_dtype
        whole = self.plan(2**62)
        self._largest = self._sizes(whole.max_model_len)
        _compile_first_kernels(self._largest)

    def plan(self, budget: int) -> ServingPlan:
        """What is served with so many bytes of cache; StartupError: one sequence does not fit."""
        step_tokens, _ = tokens_a_step(self._settings, "cuda")
        return plan_serving(
            self._model.config, self._settings, self._cache_dtype, step_tokens, budget, device_type="cuda",
            num_steps_ahead=SlotExecutor.num_steps_ahead,
        )  # fmt: skip

    def cache_bytes(self) -> int:
        """For the cache: as the settings say, or what --gpu-memory-utilization leaves beside all else."""
        if self._settings.kv_cache_memory is not None:
            return self._settings.kv_cache_memory
        return _free_for_cache(self._largest, self._settings.gpu_memory_utilization)

    def executor(self, max_model_len: int, num_blocks: int, order: CaptureOrder | None = None) -> SlotExecutor:
        """The executor of a plan with these numbers; begins to prepare the kernels of usual steps."""
        sizes = self._sizes(max_model_len)
        steps = sizes.steps(num_blocks)
        preparation = Preparation(steps, sizes.rehearsal(), order)
        preparation.start()
        return SlotExecutor(steps, sizes.layout, sizes.max_rows, preparation)

    def _sizes(self, max_model_len: int) -> "_Sizes":
        settings = dataclasses.replace(self._settings, max_model_len=max_model_len)
        config, _ = serving_config(self._model.config, settings)
        return _Sizes(
            model=self._model.with_windows_of(config),
            layout=layout_of(config, settings, "cuda", SlotExecutor.num_steps_ahead),
            cache_dtype=self._cache_dtype,
            max_rows=concurrency_of(settings, "cuda"),
            max_tokens=tokens_a_step(settings, "cuda")[0],
            max_drafted=MAX_GPU_DRAFT_TOKENS if drafts_by(settings, "cuda") else 0,
        )


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What steps are made for."""

    model: TritonModel
    layout: CacheLayout
    cache_dtype: torch.dtype
    max_rows: int
    max_tokens: int
    max_drafted: int

    def steps(self, num_blocks: int) -> Steps:
        """With a cache of that many blocks and one more, which nobody's slot writes to."""
        model, layout = self.model, self.layout
        cache = PagedKVCache(model.config, num_blocks + 1, layout.block_size, self.cache_dtype, model.device)
        entries = layout.peak_blocks(2**31, self.max_tokens) + 1
        return Steps(
            model, cache, max_rows=self.max_rows, max_tokens=self.max_tokens, table_entries=entries,
            max_drafted=self.max_drafted,
        )  # fmt: skip

    def alone(self) -> "_Sizes":
        """The same without other ranks."""
        return dataclasses.replace(self, model=self.model.alone())

    def rehearsal(self) -> Steps:
        """What `Preparation` computes on: steps without a cache and without other ranks."""
        return dataclasses.replace(self.alone(), max_tokens=min(self.max_tokens, ODD_TOKENS)).steps(0)


def _compile_first_kernels(sizes: _Sizes) -> None:
    """Compile what is needed before the first answer, on several threads: Triton works without Python's lock mostly."""

    def run(program: Decoding | Prefill) -> None:
        torch.cuda.set_device(sizes.model.device)  # that of a new thread is the first one
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream(sizes.model.device)):
            sizes.rehearsal().run_program(program)
            torch.cuda.current_stream().synchronize()

    with ThreadPoolExecutor(NUM_COMPILERS, "compiler") as threads:
        list(threads.map(run, first_programs(sizes.max_rows, sizes.max_tokens)))


def _free_for_cache(sizes: _Sizes, utilization: float) -> int:
    """Bytes that are left of this share of the GPU's memory when the largest steps run."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    free, total = torch.cuda.mem_get_info()
    rehearsal = sizes.rehearsal()  # which will compute beside the steps
    rehearsal.rehearse()
    sizes.alone().steps(0).rehearse()
    del rehearsal
    torch.cuda.synchronize()
    steps_bytes = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    left = int(total * utilization) - (total - free) - steps_bytes - RESERVE_BYTES
    logger.info("the largest steps take %.2f GiB beside weights and cache", steps_bytes / 2**30)
    return max(0, left)
