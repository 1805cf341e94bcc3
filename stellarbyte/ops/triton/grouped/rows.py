"""The product of rows with a matrix in groups: codes become numbers in registers, in front of the matrix units.

The weights are the wide operand, the rows the narrow one. Each turn of a step multiplies some blocks of inputs: groups
of 8 bits (here) or slabs of 4 bits (`rows_int4`). Scales and zero points of the next step are loaded while this one is
computed, as they do not go through shared memory ahead of time like the codes. Where outputs are few, there is enough
work for all multiprocessors if warps divide the blocks among each other (`split`), and programs too (`parts`).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from stellarbyte.ops.triton.gates import NO_GATE
from stellarbyte.ops.triton.grouped.parts import store_rows, sum_parts
from stellarbyte.ops.triton.grouped.rows_int4 import int4_rows_kernel
from stellarbyte.ops.triton.grouped.weights import SLAB, GroupedWeight
from stellarbyte.ops.triton.overlap import no_tiles, overlapping, wait_for_inputs

# T rows, N outputs, K inputs, S blocks at once, B inputs of a block

_FULL = 256  # programs


class RowsTile(NamedTuple):
    """Of a program: rows, outputs, blocks at once, warps, steps loaded ahead, turns in a step; how many programs divide
    the blocks of an output; and whether int4 is scaled before the product, which rounds its numbers to the rows' dtype,
    instead of the sums of groups after it."""

    rows: int
    block_n: int
    split: int
    num_warps: int
    num_stages: int
    unroll: int = 1
    parts: int = 1
    scales_first: bool = False


def rows_tile(num_rows: int, num_outputs: int, weight: GroupedWeight, dtype: torch.dtype) -> RowsTile:
    """Enough programs to fill the GPU, and enough codes on their way; steps of few inputs are unrolled."""
    rows = min(128, max(8, triton.next_power_of_2(num_rows)))
    is_wide = dtype == torch.float32  # tiles of rows have to fit into shared memory
    if weight.kind == "int4":
        num_stages = 2 if is_wide else 3
        if rows <= 16:
            return RowsTile(rows, 32, 4, 4, 2 if is_wide else 4)
        if rows <= 64 and num_outputs < 8192:
            return RowsTile(rows, 64, 1, 4, num_stages, 2, 4, scales_first=True)
        if rows <= 64:
            return RowsTile(rows, 128, 1, 8, 2 if is_wide else 4, 1, 2, scales_first=True)
        parts = _parts(num_outputs // 128 * triton.cdiv(num_rows, rows))
        return RowsTile(rows, 128, 1, 8, num_stages, 2, parts, scales_first=True)
    unroll = max(1, 128 // weight.group_size)
    if rows <= 16:
        if num_outputs < 8192:
            return RowsTile(rows, 16, 4, 4, 3 if is_wide else 4, min(2, unroll))
        return RowsTile(rows, 32, 4, 4, 3 if is_wide or unroll > 1 else 4, min(2, unroll))
    if rows <= 64:
        return RowsTile(rows, 64, 1, 4, 4, unroll, _parts(num_outputs // 64))
    num_stages = 2 if is_wide else 3 if weight.group_size == 128 else 4
    return RowsTile(rows, 128, 1, 8, num_stages, unroll, _parts(num_outputs // 128 * triton.cdiv(num_rows, rows)))


def invariant_tile(weight: GroupedWeight) -> RowsTile:
    """The same for any number of rows: the groups of an output are added from the first to the last."""
    if weight.kind == "int4":
        return RowsTile(64, 64, 1, 4, 3, 2, scales_first=True)
    return RowsTile(64, 64, 1, 4, 4, max(1, 128 // weight.group_size))


def _parts(num_programs: int) -> int:
    """Of the groups, so that most multiprocessors have two programs."""
    return min(4, max(1, _FULL // max(1, num_programs)))


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
    """As `linear.linear`, for any number of contiguous rows, without a norm."""
    num_rows, num_outputs = len(x_TK), weight.num_outputs // (2 if gate else 1)
    block = SLAB if weight.kind == "int4" else weight.group_size
    num_steps = triton.cdiv(weight.num_inputs, block * tile.split * tile.unroll)
    steps_of_part = triton.cdiv(num_steps, tile.parts)
    parts = triton.cdiv(num_steps, steps_of_part)  # without empty ones
    target = out_TN
    if parts > 1:
        target = torch.empty(parts, 2 if gate else 1, *out_TN.shape, dtype=torch.float32, device=x_TK.device)
    kernel, own = _rows_kernel, {}
    if weight.kind == "int4":
        kernel = int4_rows_kernel
        own = {
            "SCALES_FIRST": tile.scales_first,
            "IS_HALF": weight.scale_dtype == torch.float16,
            "HAS_REAL_ZEROS": weight.has_real_zeros,
        }
    kernel[(triton.cdiv(num_outputs, tile.block_n), triton.cdiv(num_rows, tile.rows), parts)](
        x_TK,
        weight.codes,
        weight.groups_GN,
        x_TK if weight.bias_N is None else weight.bias_N,
        x_TK if residual_TN is None else residual_TN,
        x_TK if branch_scale_N is None else branch_scale_N,
        target,
        num_rows,
        num_outputs,
        weight.num_inputs,
        ROWS=tile.rows,
        BLOCK_N=tile.block_n,
        GROUP=weight.group_size,
        SPLIT=tile.split,
        UNROLL=tile.unroll,
        NUM_STEPS=num_steps,
        STEPS_OF_PART=steps_of_part,
        EVEN=weight.num_inputs % (block * tile.split * tile.unroll) == 0,
        HAS_BIAS=weight.bias_N is not None,
        HAS_RESIDUAL=residual_TN is not None,
        HAS_BRANCH_SCALE=branch_scale_N is not None,
        IS_PART=parts > 1,
        GATE=gate,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **own,
        **overlapping(x_TK.device),
    )
    if parts > 1:
        sum_parts(
            target, out_TN, bias_N=weight.bias_N, gate=gate, residual_TN=residual_TN, branch_scale_N=branch_scale_N
        )


@triton.jit(do_not_specialize=["num_rows"])
def _rows_kernel(
    x, codes, scales, bias, residual, branch_scale, out, num_rows, num_outputs, num_inputs,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, UNROLL: tl.constexpr,
    NUM_STEPS: tl.constexpr, STEPS_OF_PART: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_BRANCH_SCALE: tl.constexpr, IS_PART: tl.constexpr, GATE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """8 bits. Tiles are [S, N, B] and [S, B, T]; without S where one group is multiplied at once,
    for wider matrix units."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, GROUP)
    inside_n, inside_t = n < num_outputs, t < num_rows
    width = num_outputs * 2 if GATE else num_outputs
    rows = x + t.to(tl.int64) * num_inputs
    total = tl.zeros([BLOCK_N, ROWS] if SPLIT == 1 else [SPLIT, BLOCK_N, ROWS], tl.float32)
    if SPLIT == 1:
        s, scales_n, scales_inside, tile_n, tile_b = 0, n, inside_n, n[:, None], b[None, :]
        tile_rows, some_n, some_t, rows_b = rows[None, :], inside_n[:, None], inside_t[None, :], b[:, None]
    else:
        s, scales_n, scales_inside = tl.arange(0, SPLIT)[:, None], n[None, :], inside_n[None, :]
        tile_n, tile_b = n[None, :, None], b[None, None, :]
        tile_rows, rows_b = rows[None, None, :], b[None, :, None]
        some_n, some_t = inside_n[None, :, None], inside_t[None, None, :]
    first = tl.program_id(2) * STEPS_OF_PART
    last = tl.minimum(first + STEPS_OF_PART, NUM_STEPS)
    ups = total
    num_groups = num_inputs // GROUP
    READS: tl.constexpr = 2 if GATE else 1  # of a group: gates, ups
    ahead = _load_scales(
        scales, first, s, scales_n, scales_inside, num_outputs, width, num_groups, SPLIT, UNROLL, READS
    )
    wait_for_inputs(OVERLAPS)
    for i in range(first, last):
        now = ahead
        ahead = _load_scales(
            scales, i + 1, s, scales_n, scales_inside, num_outputs, width, num_groups, SPLIT, UNROLL, READS
        )
        for j in tl.static_range(UNROLL):
            g = (i * UNROLL + j) * SPLIT + s
            if SPLIT > 1:
                g = g[:, :, None]
            mask, mask_x = some_n, some_t
            if not EVEN:
                mask, mask_x = some_n & (g < num_groups), some_t & (g < num_groups)
            v = tl.load(tile_rows + g * GROUP + rows_b, mask=mask_x, other=0.0)
            place = codes + tile_n.to(tl.int64) * num_inputs + g * GROUP + tile_b
            total = _add_groups(total, v, place, now[j * READS], mask)
            if GATE:
                ups = _add_groups(ups, v, place + tl.cast(num_outputs, tl.int64) * num_inputs, now[j * READS + 1], mask)
    if SPLIT > 1:
        total, ups = tl.sum(total, axis=0), tl.sum(ups, axis=0)
    store_rows(
        total, ups, out, bias, residual, branch_scale, n, t, num_rows, num_outputs, ROWS,
        HAS_BIAS, HAS_RESIDUAL, HAS_BRANCH_SCALE, IS_PART, GATE,
    )  # fmt: skip


@triton.jit
def _load_scales(
    scales, i, s, n, inside, num_outputs, width, num_groups, SPLIT: tl.constexpr, UNROLL: tl.constexpr,
    READS: tl.constexpr,
):  # fmt: skip
    """Of step i: for each of its turns, scales of gates, then of ups."""
    loaded = no_tiles()
    for j in tl.static_range(UNROLL):
        g = (i * UNROLL + j) * SPLIT + s
        for r in tl.static_range(READS):
            loaded += (tl.load(scales + g * width + r * num_outputs + n, mask=inside & (g < num_groups), other=0.0),)
    return loaded


@triton.jit
def _add_groups(total, v, place, scale, mask):
    """total + the products with groups at `place`."""
    w = tl.load(place, mask=mask, other=0.0).to(v.dtype)
    return total + tl.expand_dims(scale, -1).to(tl.float32) * tl.dot(w, v, input_precision="ieee")
