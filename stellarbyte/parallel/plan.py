"""What of a model fits on equal devices, divided among ranks or copied; arithmetic from the config alone."""

import math
from dataclasses import dataclass

import torch

from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.checkpoint.shapes import expected_shapes
from stellarbyte.config import ByteModelConfig
from stellarbyte.parallel.shares import RankShare, UndividedError, refuse_undivided

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
USED_SHARE = 0.9  # of a device's memory: the default of --gpu-memory-utilization


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """A model on `replicas` groups of `ranks` devices. Bytes are those of the first rank, which holds most.

    Attributes:
        weight_bytes: of its share of the model.
        kv_bytes_per_token: keys and values of one token, of its heads in all layers.
        cache_bytes: left for the cache; what a step computes with comes out of it. None: the memory is not known.
        cache_tokens: that a group's cache holds.
        full_sequences: of `kept_tokens` that it holds; less than 1: the model fits with a shorter context only, or
            not at all.
    """

    dtype: str
    ranks: int
    replicas: int
    weight_bytes: int
    kv_bytes_per_token: int
    cache_bytes: int | None
    cache_tokens: int | None
    full_sequences: float | None


def plan_ranks(
    config: ByteModelConfig, kept_tokens: int, *, devices: int = 1, memory: int | None = None
) -> list[RankPlan]:
    """All numbers of ranks up to `devices` that can divide the model, in each serving dtype.

    Args:
        kept_tokens: that the cache keeps of a sequence of full length.
        memory: bytes of each device; None: not known.
    """
    sizes = [ranks for ranks in range(1, devices + 1) if _can_divide(config, ranks)]
    return [_plan(config, kept_tokens, dtype, ranks, devices, memory) for dtype in DTYPES for ranks in sizes]


def rank_weight_bytes(share: RankShare, dtype: torch.dtype) -> int:
    """Bytes of a rank's parameters."""
    shapes = expected_shapes(share.config)
    numbers = 0
    for name, piece in share.pieces().items():
        sizes = [len(range(size)[cut]) for size, cut in zip(shapes[name], piece.index, strict=False)]
        numbers += math.prod([*sizes, *shapes[name][len(sizes) :]])
    return numbers * dtype.itemsize


def _can_divide(config: ByteModelConfig, ranks: int) -> bool:
    try:
        refuse_undivided(config, ranks)
    except UndividedError:
        return False
    return True


def _plan(
    config: ByteModelConfig, kept_tokens: int, dtype: str, ranks: int, devices: int, memory: int | None
) -> RankPlan:
    share = RankShare(config=config, rank=0, ranks=ranks)
    weight_bytes = rank_weight_bytes(share, DTYPES[dtype])
    per_token = PagedKVCache.bytes_per_token(share.own_config, DTYPES[dtype])
    cache_bytes = None if memory is None else max(0, int(memory * USED_SHARE) - weight_bytes)
    cache_tokens = None if cache_bytes is None else cache_bytes // per_token
    return RankPlan(
        dtype=dtype,
        ranks=ranks,
        replicas=devices // ranks,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=per_token,
        cache_bytes=cache_bytes,
        cache_tokens=cache_tokens,
        full_sequences=None if cache_tokens is None else cache_tokens / kept_tokens,
    )
