"""Products with a matrix in groups, by the number of rows."""

import torch
import triton
import triton.language as tl

from stellarbyte.ops.triton.gates import NO_GATE
from stellarbyte.ops.triton.grouped.rows import RowsTile, rows_product, rows_tile
from stellarbyte.ops.triton.grouped.unpack import group_scale, group_zero
from stellarbyte.ops.triton.grouped.vector import vector_product, vector_tile
from stellarbyte.ops.triton.grouped.weights import SLAB, GroupedWeight
from stellarbyte.ops.triton.overlap import overlapping, wait_for_inputs

# T rows, N outputs, K inputs

MAX_ROWS = 256  # beyond, a product of cuBLAS with the dequantized matrix is faster
_BLOCK_N = 64


def can_norm(num_rows: int, weight: GroupedWeight) -> bool:
    """Whether `grouped_linear` takes a norm of the rows."""
    return num_rows <= 1 and weight.kind == "int4"


def grouped_linear(
    x_TK: torch.Tensor,
    weight: GroupedWeight,
    *,
    norm_K: torch.Tensor | None = None,
    eps: float = 0.0,
    gate: int = NO_GATE,
    residual_TN: torch.Tensor | None = None,
    branch_scale_N: torch.Tensor | None = None,
    out_TN: torch.Tensor | None = None,
    tile: RowsTile | None = None,
) -> torch.Tensor:
    """As `linear.linear`, for any number of rows; a norm where `can_norm`.

    `tile`: of `rows.rows_product`, for any number of rows; None: the fastest kernel, and its tile.
    """
    num_rows, num_outputs = len(x_TK), weight.num_outputs // (2 if gate else 1)
    if out_TN is None:
        out_TN = x_TK.new_empty(num_rows, num_outputs)
    if not num_rows:
        return out_TN
    if tile is None and can_norm(num_rows, weight):
        vector_product(
            x_TK, weight, out_TN, norm_K=norm_K, eps=eps, gate=gate, residual_1N=residual_TN,
            branch_scale_N=branch_scale_N, tile=vector_tile(weight.num_inputs),
        )  # fmt: skip
        return out_TN
    assert norm_K is None, "several rows are normed by another kernel"
    rows_product(
        x_TK, weight, out_TN, gate=gate, residual_TN=residual_TN, branch_scale_N=branch_scale_N,
        tile=rows_tile(num_rows, num_outputs, weight, x_TK.dtype) if tile is None else tile,
    )  # fmt: skip
    return out_TN


def dequantize(weight: GroupedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [N, K] in `dtype`, for products of many rows."""
    num_outputs, num_inputs, group = weight.num_outputs, weight.num_inputs, weight.group_size
    out_NK = torch.empty(num_outputs, num_inputs, dtype=dtype, device=weight.device)
    kernel, block, own = _dequantize_kernel, group, {}
    if weight.kind == "int4":
        kernel, block = _dequantize_int4_kernel, SLAB
        own = {"IS_HALF": weight.scale_dtype == torch.float16, "HAS_REAL_ZEROS": weight.has_real_zeros}
    kernel[(triton.cdiv(num_outputs, _BLOCK_N), triton.cdiv(num_inputs, block))](
        weight.codes, weight.groups_GN, out_NK, num_outputs, num_inputs, BLOCK_N=_BLOCK_N, GROUP=group, **own,
        **overlapping(weight.device),
    )  # fmt: skip
    return out_NK


@triton.jit
def _dequantize_kernel(
    codes, scales, out, num_outputs, num_inputs, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One group of some outputs, of 8 bits."""
    wait_for_inputs(OVERLAPS)  # the product before may still read what lies in this memory
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = tl.program_id(1).to(tl.int64)
    inside = n < num_outputs
    scale = tl.load(scales + g * num_outputs + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    offsets = n[:, None] * num_inputs + g * GROUP + tl.arange(0, GROUP)[None, :]
    mask = inside[:, None] & (tl.arange(0, GROUP) < GROUP)[None, :]
    numbers = tl.load(codes + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offsets, (numbers * scale).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize_int4_kernel(
    codes, groups, out, num_outputs, num_inputs, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, IS_HALF: tl.constexpr,
    HAS_REAL_ZEROS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One slab of some outputs, by its quarters of 16 inputs."""
    wait_for_inputs(OVERLAPS)  # the product before may still read what lies in this memory
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.program_id(1).to(tl.int64)
    b = tl.arange(0, 16)[None, :]
    inside = n < num_outputs
    numbers = tl.load(codes + (h * num_outputs + n[:, None]) * 16 + b, mask=inside[:, None], other=0).to(tl.int32)
    for quarter in tl.static_range(4):
        first = h * 64 + quarter * 16
        mask = inside & (first < num_inputs)
        words = tl.load(groups + first // GROUP * num_outputs + n, mask=mask, other=0)
        number = (numbers >> 4 * quarter & 15).to(tl.float32) - group_zero(words, HAS_REAL_ZEROS)[:, None]
        number *= group_scale(words, IS_HALF)[:, None]
        tl.store(out + n[:, None] * num_inputs + first + b, number.to(out.dtype.element_ty), mask=mask[:, None])
