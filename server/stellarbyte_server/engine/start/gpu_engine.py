"""From a model on a GPU to an executor: measures what steps take of its memory, and gives the rest to the cache."""

import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from stellarbyte.backends.gpu.model import TritonModel
from stellarbyte.backends.gpu.preparation import Preparation, first_programs
from stellarbyte.backends.gpu.prompts import ODD_TOKENS
from stellarbyte.backends.gpu.steps import Decoding, Prefill, Steps
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte_server.engine.run.slot_executor import SlotExecutor
from stellarbyte_server.engine.start.serving_plan import ServingPlan
from stellarbyte_server.engine.state.block_pool import CacheLayout

logger = logging.getLogger("server.engine")

# For what is not seen by measuring: captured graphs, libraries' workspaces of other shapes, fragments.
RESERVE_BYTES = 512 * 2**20
NUM_COMPILERS = 4


def make_gpu_executor(
    model: TritonModel,
    plan_for: Callable[[int], ServingPlan],
    *,
    cache_dtype: torch.dtype,
    max_num_seqs: int,
    step_tokens: int,
    max_drafted: int,
    gpu_memory_utilization: float,
    kv_cache_memory: int | None,
) -> tuple[SlotExecutor, ServingPlan]:
    """An executor with its cache, and what it serves.

    From here on the calling thread, which is to be the engine's, works on a CUDA stream of its own.

    Args:
        plan_for: what is served with so many bytes of cache.
        max_drafted: most tokens of drafts in a step; 0: no drafts.
        cache_dtype: the model's, or torch.float8_e4m3fn.
        kv_cache_memory: bytes for the cache; None: what `gpu_memory_utilization` leaves beside all else.
    """
    torch.cuda.synchronize()
    torch.cuda.set_stream(torch.cuda.Stream(priority=-1))  # before that of the thread which prepares kernels
    whole = plan_for(2**62)
    sizes = _Sizes(
        model=model.with_windows_of(whole.config), layout=whole.cache.layout, cache_dtype=cache_dtype,
        max_rows=max_num_seqs, max_tokens=step_tokens, max_drafted=max_drafted,
    )  # fmt: skip
    _compile_first_kernels(sizes)
    if kv_cache_memory is None:
        kv_cache_memory = _free_for_cache(sizes, gpu_memory_utilization)
    plan = plan_for(kv_cache_memory)
    layout = plan.cache.layout
    sizes = dataclasses.replace(sizes, model=model.with_windows_of(plan.config), layout=layout)
    steps = sizes.steps(plan.cache.num_blocks)
    preparation = Preparation(steps, sizes.rehearsal())
    preparation.start()
    return SlotExecutor(steps, layout, max_num_seqs, preparation), plan


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

    def rehearsal(self) -> Steps:
        """What `Preparation` computes on: steps without a cache."""
        return dataclasses.replace(self, max_tokens=min(self.max_tokens, ODD_TOKENS)).steps(0)


def _compile_first_kernels(sizes: _Sizes) -> None:
    """Compile what is needed before the first answer, on several threads: Triton works without Python's lock mostly."""

    def run(program: Decoding | Prefill) -> None:
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
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
    sizes.steps(0).rehearse()
    del rehearsal
    torch.cuda.synchronize()
    steps_bytes = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    left = int(total * utilization) - (total - free) - steps_bytes - RESERVE_BYTES
    logger.info("the largest steps take %.2f GiB beside weights and cache", steps_bytes / 2**30)
    return max(0, left)
