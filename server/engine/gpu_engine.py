"""From a model on a GPU to a runner: measures what steps take of its memory, and gives the rest to the cache."""

import logging
from collections.abc import Callable

import torch

from server.engine.block_pool import CacheLayout
from server.engine.gpu_runner import GpuRunner
from server.engine.plan import CachePlan
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.kernels.triton.model import TritonModel
from stellarbyte.kernels.triton.preparation import Preparation
from stellarbyte.kernels.triton.prompts import ODD_TOKENS
from stellarbyte.kernels.triton.steps import Steps

logger = logging.getLogger("server.engine")

# For what is not seen by measuring: captured graphs, libraries' workspaces of other shapes, fragments.
RESERVE_BYTES = 512 * 2**20


def make_gpu_runner(
    model: TritonModel,
    plan_for: Callable[[int], CachePlan],
    *,
    max_num_seqs: int,
    step_tokens: int,
    gpu_memory_utilization: float,
    kv_cache_memory: int | None,
) -> tuple[GpuRunner, CachePlan]:
    """A runner with its cache, and the plan of that.

    From here on the calling thread, which is to be the engine's, works on a CUDA stream of its own.

    Args:
        plan_for: divides bytes into blocks.
        kv_cache_memory: bytes for the cache; None: what `gpu_memory_utilization` leaves beside all else.
    """
    torch.cuda.synchronize()
    torch.cuda.set_stream(torch.cuda.Stream(priority=-1))  # before that of the thread which prepares kernels
    if kv_cache_memory is None:
        kv_cache_memory = _free_for_cache(model, plan_for, max_num_seqs, step_tokens, gpu_memory_utilization)
    plan = plan_for(kv_cache_memory)
    cache = _cache(model, plan.num_blocks, plan.layout.block_size)
    steps = _steps(model, cache, plan.layout, max_num_seqs, step_tokens)
    preparation = Preparation(steps, _rehearsal(model, plan.layout, max_num_seqs, step_tokens))
    preparation.start()
    return GpuRunner(steps, plan.layout, max_num_seqs, preparation), plan


def _free_for_cache(
    model: TritonModel, plan_for: Callable[[int], CachePlan], max_num_seqs: int, step_tokens: int, utilization: float
) -> int:
    """Bytes that are left of this share of the GPU's memory when the largest steps run."""
    layout = plan_for(2**62).layout
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    free, total = torch.cuda.mem_get_info()
    rehearsal = _rehearsal(model, layout, max_num_seqs, step_tokens)  # which will compute beside the steps
    rehearsal.rehearse()
    _steps(model, _cache(model, 0, layout.block_size), layout, max_num_seqs, step_tokens).rehearse()
    del rehearsal
    torch.cuda.synchronize()
    steps_bytes = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    left = int(total * utilization) - (total - free) - steps_bytes - RESERVE_BYTES
    logger.info("the largest steps take %.2f GiB beside weights and cache", steps_bytes / 2**30)
    return max(0, left)


def _cache(model: TritonModel, num_blocks: int, block_size: int) -> PagedKVCache:
    """With one block more, which nobody's slot writes to."""
    return PagedKVCache(model.config, num_blocks + 1, block_size, model.embedding_VC.dtype, model.device)


def _steps(model: TritonModel, cache: PagedKVCache, layout: CacheLayout, max_num_seqs: int, step_tokens: int) -> Steps:
    entries = layout.peak_blocks(2**31, step_tokens) + 1
    return Steps(model, cache, max_rows=max_num_seqs, max_tokens=step_tokens, table_entries=entries)


def _rehearsal(model: TritonModel, layout: CacheLayout, max_num_seqs: int, step_tokens: int) -> Steps:
    """What `Preparation` computes on: steps without a cache."""
    cache = _cache(model, 0, layout.block_size)
    return _steps(model, cache, layout, max_num_seqs, min(step_tokens, ODD_TOKENS))
