"""The ends of products of rows: what stands around a product, or the sum of several programs' parts of the inputs."""

import torch
import triton
import triton.language as tl

from stellarbyte.ops.triton.linear import finish
from stellarbyte.ops.triton.overlap import overlapping, wait_for_inputs

# P parts, T rows, N outputs

_BLOCK = 256


def sum_parts(
    parts: torch.Tensor,
    out_TN: torch.Tensor,
    *,
    bias_N: torch.Tensor | None,
    gate: int,
    residual_TN: torch.Tensor | None,
    branch_scale_N: torch.Tensor | None,
) -> None:
    """As `linear.linear` after its product, always summed in the same order.

    Args:
        parts: float32 [P, 1, T, N]; with a gate [P, 2, T, N], gates and ups.
    """
    num_rows, num_outputs = out_TN.shape
    _sum_kernel[(triton.cdiv(num_outputs, _BLOCK), num_rows)](
        parts,
        out_TN if bias_N is None else bias_N,
        out_TN if residual_TN is None else residual_TN,
        out_TN if branch_scale_N is None else branch_scale_N,
        out_TN,
        num_outputs,
        num_rows * num_outputs,
        BLOCK=_BLOCK,
        NUM_PARTS=len(parts),
        HAS_BIAS=bias_N is not None,
        HAS_RESIDUAL=residual_TN is not None,
        HAS_BRANCH_SCALE=branch_scale_N is not None,
        GATE=gate,
        num_warps=4,
        **overlapping(out_TN.device),
    )


@triton.jit
def _sum_kernel(
    parts, bias, residual, branch_scale, out, num_outputs, numbers, BLOCK: tl.constexpr, NUM_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BRANCH_SCALE: tl.constexpr, GATE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPS)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < num_outputs
    offsets = tl.program_id(1).to(tl.int64) * num_outputs + n
    READS: tl.constexpr = 2 if GATE else 1
    total = tl.zeros([BLOCK], tl.float32)
    addend, ups = total, total
    for p in tl.static_range(NUM_PARTS):
        part = parts + p * READS * numbers.to(tl.int64) + offsets
        total += tl.load(part, mask=inside, other=0.0)
        if GATE:
            ups += tl.load(part + numbers, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        addend = tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    finish(
        total, ups, addend, out, bias, bias, branch_scale, offsets, n, num_outputs, inside,
        False, HAS_BIAS, HAS_RESIDUAL, HAS_BRANCH_SCALE, GATE,
    )  # fmt: skip


@triton.jit
def store_rows(
    total, ups, out, bias, residual, branch_scale, n, t, num_rows, num_outputs, ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BRANCH_SCALE: tl.constexpr, IS_PART: tl.constexpr,
    GATE: tl.constexpr,
):  # fmt: skip
    """Store products [N, T] as part `tl.program_id(2)` of those that `sum_parts` takes, or after what `finish` does."""
    inside = (n < num_outputs)[:, None] & (t < num_rows)[None, :]
    many_n = n[:, None] + tl.zeros([1, ROWS], tl.int32)
    offsets = t.to(tl.int64)[None, :] * num_outputs + many_n
    if IS_PART:
        READS: tl.constexpr = 2 if GATE else 1
        numbers = num_rows.to(tl.int64) * num_outputs
        part = out + tl.program_id(2) * READS * numbers
        tl.store(part + offsets, total, mask=inside)
        if GATE:
            tl.store(part + numbers + offsets, ups, mask=inside)
    else:
        addend = total
        if HAS_RESIDUAL:
            addend = tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
        finish(
            total, ups, addend, out, bias, bias, branch_scale, offsets, many_n, num_outputs, inside,
            False, HAS_BIAS, HAS_RESIDUAL, HAS_BRANCH_SCALE, GATE,
        )  # fmt: skip
