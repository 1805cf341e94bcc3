"""Several packed adapters as one, whose A's are stacked, B's concatenated, and other changes added up."""

from collections.abc import Sequence

import numpy as np
import torch

from stellarbyte.config import ByteModelConfig
from stellarbyte.lora.bank import Integers, PackedAdapter, Projections, matrix_at, offsets
from stellarbyte.lora.peft_config import AdapterError
from stellarbyte.lora.untouched_memory import large_array

# L layers, P projections, r rank


def mixed(parts: Sequence[tuple[PackedAdapter, float]], config: ByteModelConfig, max_rank: int) -> PackedAdapter:
    """The adapter whose change of the weights is Σ scale · (alpha / r) · B A, of rank Σ r.

    Args:
        parts: packed adapters of one dtype, with their scales.

    Raises:
        AdapterError: the ranks of a module add up to more than `max_rank`.
    """
    projections = Projections.of(config)
    ranks_LP: Integers = np.sum([adapter.ranks_LP for adapter, _ in parts], axis=0, dtype=np.int64)
    if (rank := int(ranks_LP.max())) > max_rank:
        raise AdapterError(f"its ranks add up to {rank}, but at most {max_rank} is supported (--max-lora-rank).")
    has_factors_LP = np.any([adapter.has_factors_LP for adapter, _ in parts], axis=0)
    a_LP, b_LP, d_LP, total = offsets(ranks_LP, has_factors_LP, projections)
    numbers = large_array(total, parts[0][0].numbers.dtype)
    filled_LP = np.zeros_like(ranks_LP)
    for adapter, scale in parts:
        a_from_LP, b_from_LP, d_from_LP, _ = offsets(adapter.ranks_LP, adapter.has_factors_LP, projections)
        for place in zip(*np.nonzero(adapter.ranks_LP), strict=True):
            out, width = projections.shapes[place[0]][place[1]]
            rank, filled = int(adapter.ranks_LP[place]), int(filled_LP[place])
            a = matrix_at(adapter.numbers, int(a_from_LP[place]), rank, width)
            b = matrix_at(adapter.numbers, int(b_from_LP[place]), rank, out)
            matrix_at(numbers, int(a_LP[place]) + filled * width, rank, width).copy_(a)
            matrix_at(numbers, int(b_LP[place]) + filled * out, rank, out).copy_(b.float() * scale)
            if adapter.has_factors_LP[place]:
                d = adapter.numbers[int(d_from_LP[place]) :][:out].float() * scale
                total_d = numbers[int(d_LP[place]) :][:out]
                total_d.copy_(total_d.float() + d)
        filled_LP += adapter.ranks_LP
    replaced: dict[str, torch.Tensor] = {}
    for adapter, scale in parts:
        for name, matrix in adapter.replaced.items():
            replaced[name] = matrix * scale if name not in replaced else replaced[name].add_(matrix, alpha=scale)
    return PackedAdapter(numbers=numbers, ranks_LP=ranks_LP, has_factors_LP=has_factors_LP, replaced=replaced)
