"""The product of a few to many rows with a matrix in groups: codes become numbers in registers, in front of the matrix
units.

The weights are the wide operand, the rows the narrow one. Each step multiplies one group, whose scale is applied to its
sum: the matrix units multiply exact codes. Where outputs are few, warps divide the groups among each other (`split`),
so that there is enough work for all multiprocessors.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from stellarbyte.ops.triton.gates import NO_GATE
from stellarbyte.ops.triton.grouped.unpack import unpack_tile
from stellarbyte.ops.triton.grouped.weights import SYMMETRIC_ZERO, GroupedWeight
from stellarbyte.ops.triton.linear import finish
from stellarbyte.ops.triton.overlap import overlapping, wait_for_inputs

# T rows, N outputs, K inputs, S groups at once, B bytes of a group

_SYMMETRIC = tl.constexpr(SYMMETRIC_ZERO)


class RowsTile(NamedTuple):
    """Of a program: rows, outputs, groups at once, warps, steps loaded ahead, and steps in a turn of the loop."""

    rows: int
    block_n: int
    split: int
    num_warps: int
    num_stages: int
    unroll: int = 1


def rows_tile(num_rows: int, num_outputs: int, group_size: int, dtype: torch.dtype) -> RowsTile:
    """Steps of few inputs are unrolled, as a turn of the loop takes time of its own."""
    rows, unroll = min(128, max(8, triton.next_power_of_2(num_rows))), max(1, 128 // group_size)
    if rows <= 16:
        block_n = 16 if group_size < 128 or num_outputs < 8192 else 32
        return RowsTile(rows, block_n, 4, 4, 4, unroll)
    if rows <= 64:
        return RowsTile(rows, 64, 1, 4, 4, unroll)
    num_stages = 2 if dtype == torch.float32 else 3 if group_size == 128 else 4  # that fit into shared memory
    return RowsTile(rows, 128, 1, 8, num_stages, unroll)


def rows_product(
    x_TK: torch.Tensor,
    weight: GroupedWeight,
    out_TN: torch.Tensor,
    *,
    gate: int = NO_GATE,
    residual_TN: torch.Tensor | None = None,
    branch_scale_N: torch.Tensor | None = None,
    tile: RowsTile,
) -> None:
    """As `linear.linear` without a norm, for any number of contiguous rows."""
    num_rows, num_outputs = len(x_TK), weight.num_outputs // (2 if gate else 1)
    num_groups = len(weight.scales_GN)
    _rows_kernel[(triton.cdiv(num_outputs, tile.block_n), triton.cdiv(num_rows, tile.rows))](
        x_TK,
        weight.codes,
        weight.scales_GN,
        x_TK if weight.zeros_GN is None else weight.zeros_GN,
        x_TK if weight.bias_N is None else weight.bias_N,
        x_TK if residual_TN is None else residual_TN,
        x_TK if branch_scale_N is None else branch_scale_N,
        out_TN,
        num_rows,
        num_outputs,
        weight.num_inputs,
        ROWS=tile.rows,
        BLOCK_N=tile.block_n,
        GROUP=weight.group_size,
        SPLIT=tile.split,
        UNROLL=tile.unroll,
        NUM_STEPS=triton.cdiv(num_groups, tile.split),
        NUM_GROUPS=num_groups,
        IS_INT4=weight.kind == "int4",
        HAS_ZEROS=weight.zeros_GN is not None,
        HAS_BIAS=weight.bias_N is not None,
        HAS_RESIDUAL=residual_TN is not None,
        HAS_BRANCH_SCALE=branch_scale_N is not None,
        GATE=gate,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **overlapping(x_TK.device),
    )


@triton.jit(do_not_specialize=["num_rows"])
def _rows_kernel(
    x, codes, scales, zeros, bias, residual, branch_scale, out, num_rows, num_outputs, num_inputs, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, UNROLL: tl.constexpr, NUM_STEPS: tl.constexpr,
    NUM_GROUPS: tl.constexpr, IS_INT4: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_BRANCH_SCALE: tl.constexpr, GATE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside_n, inside_t = n < num_outputs, t < num_rows
    width = num_outputs * 2 if GATE else num_outputs
    rows = x + t.to(tl.int64) * num_inputs
    if SPLIT == 1:
        total = tl.zeros([BLOCK_N, ROWS], tl.float32)
        ups = total
        for g in tl.range(NUM_GROUPS, loop_unroll_factor=UNROLL):
            total = _add_group(
                total, rows, codes, scales, zeros, g, n, width, num_inputs, inside_n, inside_t, out.dtype.element_ty,
                GROUP, IS_INT4, HAS_ZEROS,
            )  # fmt: skip
            if GATE:
                ups = _add_group(
                    ups, rows, codes, scales, zeros, g, num_outputs + n, width, num_inputs, inside_n, inside_t,
                    out.dtype.element_ty, GROUP, IS_INT4, HAS_ZEROS,
                )  # fmt: skip
    else:
        totals = tl.zeros([SPLIT, BLOCK_N, ROWS], tl.float32)
        all_ups = totals
        for i in tl.range(NUM_STEPS, loop_unroll_factor=UNROLL):
            g = i * SPLIT + tl.arange(0, SPLIT)
            totals = _add_groups(
                totals, rows, codes, scales, zeros, g, n, width, num_inputs, inside_n, inside_t, out.dtype.element_ty,
                GROUP, NUM_GROUPS, IS_INT4, HAS_ZEROS,
            )  # fmt: skip
            if GATE:
                all_ups = _add_groups(
                    all_ups, rows, codes, scales, zeros, g, num_outputs + n, width, num_inputs, inside_n, inside_t,
                    out.dtype.element_ty, GROUP, NUM_GROUPS, IS_INT4, HAS_ZEROS,
                )  # fmt: skip
        total, ups = tl.sum(totals, axis=0), tl.sum(all_ups, axis=0)
    inside = inside_n[:, None] & inside_t[None, :]
    many_n = n[:, None] + tl.zeros([1, ROWS], tl.int32)
    offsets = t.to(tl.int64)[None, :] * num_outputs + many_n
    addend = total
    if HAS_RESIDUAL:
        addend = tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    finish(
        total, ups, addend, out, scales, bias, branch_scale, offsets, many_n, num_outputs, inside,
        False, HAS_BIAS, HAS_RESIDUAL, HAS_BRANCH_SCALE, GATE,
    )  # fmt: skip


@triton.jit
def _add_group(
    total, rows, codes, scales, zeros, g, n, width, num_inputs, inside_n, inside_t, ELEMENT: tl.constexpr,
    GROUP: tl.constexpr, IS_INT4: tl.constexpr, HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    """[N, T]: total + the products with group g."""
    BYTES: tl.constexpr = GROUP // 2 if IS_INT4 else GROUP
    b = tl.arange(0, BYTES)
    mask = inside_n[:, None] & (b < BYTES)[None, :]
    scale = tl.load(scales + g * width + n, mask=inside_n, other=0.0).to(tl.float32)
    inside_x = (b < BYTES)[:, None] & inside_t[None, :]
    if IS_INT4:
        slab = g * (GROUP // 32) + b // 16
        w = tl.load(
            codes + (slab[None, :] * width + n.to(tl.int64)[:, None]) * 16 + b[None, :] % 16, mask=mask, other=0
        )
        zero = tl.full(n.shape, _SYMMETRIC, tl.int32)
        if HAS_ZEROS:
            zero = tl.load(zeros + g * width + n, mask=inside_n, other=0).to(tl.int32)
        low, high = unpack_tile(w, zero[:, None], ELEMENT)
        k = (slab * 32 + b % 16)[:, None]
        product = tl.dot(low, tl.load(rows[None, :] + k, mask=inside_x, other=0.0), input_precision="ieee")
        v = tl.load(rows[None, :] + k + 16, mask=inside_x, other=0.0)
        product = tl.dot(high, v, product, input_precision="ieee")
    else:
        k = g * GROUP + b
        w = tl.load(codes + n.to(tl.int64)[:, None] * num_inputs + k[None, :], mask=mask, other=0.0).to(ELEMENT)
        v = tl.load(rows[None, :] + k[:, None], mask=inside_x, other=0.0)
        product = tl.dot(w, v, input_precision="ieee")
    return total + scale[:, None] * product


@triton.jit
def _add_groups(
    total, rows, codes, scales, zeros, g, n, width, num_inputs, inside_n, inside_t, ELEMENT: tl.constexpr,
    GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr, IS_INT4: tl.constexpr, HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    """[S, N, T]: total + the products with each of the groups g."""
    BYTES: tl.constexpr = GROUP // 2 if IS_INT4 else GROUP
    b = tl.arange(0, BYTES)[None, :]
    inside_g = g < NUM_GROUPS
    inside_gn = inside_g[:, None] & inside_n[None, :]
    mask = inside_gn[:, :, None] & (b < BYTES)[:, None, :]
    inside_x = (inside_g[:, None] & (b < BYTES))[:, :, None] & inside_t[None, None, :]
    place = g[:, None] * width + n[None, :]
    scale = tl.load(scales + place, mask=inside_gn, other=0.0).to(tl.float32)
    if IS_INT4:
        slab = g[:, None] * (GROUP // 32) + b // 16
        row = slab[:, None, :] * width + n.to(tl.int64)[None, :, None]
        w = tl.load(codes + row * 16 + (b % 16)[:, None, :], mask=mask, other=0)
        zero = tl.full(place.shape, _SYMMETRIC, tl.int32)
        if HAS_ZEROS:
            zero = tl.load(zeros + place, mask=inside_gn, other=0).to(tl.int32)
        low, high = unpack_tile(w, zero[:, :, None], ELEMENT)
        k = (slab * 32 + b % 16)[:, :, None]
        product = tl.dot(low, tl.load(rows[None, None, :] + k, mask=inside_x, other=0.0), input_precision="ieee")
        v = tl.load(rows[None, None, :] + k + 16, mask=inside_x, other=0.0)
        product = tl.dot(high, v, product, input_precision="ieee")
    else:
        k = g[:, None] * GROUP + b
        row = n.to(tl.int64)[None, :, None] * num_inputs
        w = tl.load(codes + row + k[:, None, :], mask=mask, other=0.0).to(ELEMENT)
        v = tl.load(rows[None, None, :] + k[:, :, None], mask=inside_x, other=0.0)
        product = tl.dot(w, v, input_precision="ieee")
    return total + scale[:, :, None] * product
