"""The product of rows with a matrix in groups: codes become numbers in registers, in front of the matrix units.

The weights are the wide operand, the rows the narrow one. Each step multiplies some groups, whose scales are applied to
their sums: the matrix units multiply exact codes. Scales and zero points of the next step are loaded while this one is
computed, as they do not go through shared memory ahead of time like the codes. Where outputs are few, there is enough
work for all multiprocessors if warps divide the groups among each other (`split`), and programs too (`parts`).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from stellarbyte.ops.triton.gates import NO_GATE
from stellarbyte.ops.triton.grouped.parts import sum_parts
from stellarbyte.ops.triton.grouped.unpack import unpack_tile
from stellarbyte.ops.triton.grouped.weights import SYMMETRIC_ZERO, GroupedWeight
from stellarbyte.ops.triton.linear import finish
from stellarbyte.ops.triton.overlap import no_tiles, overlapping, wait_for_inputs

# T rows, N outputs, K inputs, S groups at once, B bytes of a group

_FULL = 256  # programs
_SYMMETRIC = tl.constexpr(SYMMETRIC_ZERO)


class RowsTile(NamedTuple):
    """Of a program: rows, outputs, groups at once, warps, steps loaded ahead, turns in a step; and how many programs
    divide the groups of an output."""

    rows: int
    block_n: int
    split: int
    num_warps: int
    num_stages: int
    unroll: int = 1
    parts: int = 1


def rows_tile(num_rows: int, num_outputs: int, weight: GroupedWeight, dtype: torch.dtype) -> RowsTile:
    """Enough programs to fill the GPU, and enough codes on their way; steps of few inputs are unrolled."""
    rows, unroll = min(128, max(8, triton.next_power_of_2(num_rows))), max(1, 128 // weight.group_size)
    is_wide = dtype == torch.float32  # tiles of rows have to fit into shared memory
    if rows <= 16:
        if num_outputs < 8192:
            split = 8 if weight.kind == "int4" and not is_wide else 4
            return RowsTile(rows, 16, split, split, 3 if is_wide else 4, min(2, unroll))
        return RowsTile(rows, 32, 4, 4, 3 if is_wide or unroll > 1 else 4, min(2, unroll))
    if rows <= 64:
        return RowsTile(rows, 64, 1, 4, 4, unroll, _parts(num_outputs // 64))
    num_stages = 2 if is_wide else 3 if weight.group_size == 128 else 4
    return RowsTile(rows, 128, 1, 8, num_stages, unroll, _parts(num_outputs // 128 * triton.cdiv(num_rows, rows)))


def invariant_tile(weight: GroupedWeight) -> RowsTile:
    """The same for any number of rows: the groups of an output are added from the first to the last."""
    return RowsTile(64, 64, 1, 4, 4, max(1, 128 // weight.group_size))


def _parts(num_programs: int) -> int:
    """Of the groups, so that most multiprocessors have two programs."""
    return min(4, max(1, _FULL // max(1, num_programs)))


def rows_product(
    x_TK: torch.Tensor,
    weight: GroupedWeight,
    out_TN: torch.Tensor,
    *,
    norm_K: torch.Tensor | None = None,
    eps: float = 0.0,
    gate: int = NO_GATE,
    residual_TN: torch.Tensor | None = None,
    branch_scale_N: torch.Tensor | None = None,
    tile: RowsTile,
) -> None:
    """As `linear.linear`, for any number of contiguous rows; with a norm only in one part."""
    num_rows, num_outputs = len(x_TK), weight.num_outputs // (2 if gate else 1)
    num_groups = len(weight.scales_GN)
    num_steps = triton.cdiv(num_groups, tile.split * tile.unroll)
    steps_of_part = triton.cdiv(num_steps, tile.parts)
    parts = triton.cdiv(num_steps, steps_of_part)  # without empty ones
    assert norm_K is None or parts == 1, "parts of inputs do not know the norm"
    target = out_TN
    if parts > 1:
        target = torch.empty(parts, 2 if gate else 1, *out_TN.shape, dtype=torch.float32, device=x_TK.device)
    _rows_kernel[(triton.cdiv(num_outputs, tile.block_n), triton.cdiv(num_rows, tile.rows), parts)](
        x_TK,
        weight.codes,
        weight.scales_GN,
        x_TK if weight.zeros_GN is None else weight.zeros_GN,
        x_TK if weight.bias_N is None else weight.bias_N,
        x_TK if norm_K is None else norm_K,
        x_TK if residual_TN is None else residual_TN,
        x_TK if branch_scale_N is None else branch_scale_N,
        target,
        num_rows,
        num_outputs,
        weight.num_inputs,
        eps,
        ROWS=tile.rows,
        BLOCK_N=tile.block_n,
        GROUP=weight.group_size,
        SPLIT=tile.split,
        UNROLL=tile.unroll,
        NUM_STEPS=num_steps,
        STEPS_OF_PART=steps_of_part,
        NUM_GROUPS=num_groups,
        IS_INT4=weight.kind == "int4",
        HAS_ZEROS=weight.zeros_GN is not None,
        HAS_BIAS=weight.bias_N is not None,
        HAS_NORM=norm_K is not None,
        HAS_RESIDUAL=residual_TN is not None,
        HAS_BRANCH_SCALE=branch_scale_N is not None,
        IS_PART=parts > 1,
        GATE=gate,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **overlapping(x_TK.device),
    )
    if parts > 1:
        sum_parts(
            target, out_TN, bias_N=weight.bias_N, gate=gate, residual_TN=residual_TN, branch_scale_N=branch_scale_N
        )


@triton.jit(do_not_specialize=["num_rows"])
def _rows_kernel(
    x, codes, scales, zeros, bias, norm, residual, branch_scale, out, num_rows, num_outputs, num_inputs, eps,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, UNROLL: tl.constexpr,
    NUM_STEPS: tl.constexpr, STEPS_OF_PART: tl.constexpr, NUM_GROUPS: tl.constexpr, IS_INT4: tl.constexpr,
    HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_BRANCH_SCALE: tl.constexpr, IS_PART: tl.constexpr, GATE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Tiles are [S, N, B] and [S, B, T]; without S where one group is multiplied at once, for wider matrix units."""
    BYTES: tl.constexpr = GROUP // 2 if IS_INT4 else GROUP
    EVEN: tl.constexpr = NUM_GROUPS % (SPLIT * UNROLL) == 0
    LOADS: tl.constexpr = 2 if HAS_ZEROS else 1  # of a group: scales, zero points
    READS: tl.constexpr = 2 if GATE else 1  # of a group: gates, ups
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, BYTES)
    inside_n, inside_t = n < num_outputs, t < num_rows
    width = num_outputs * 2 if GATE else num_outputs
    rows = x + t.to(tl.int64) * num_inputs
    total = tl.zeros([BLOCK_N, ROWS] if SPLIT == 1 else [SPLIT, BLOCK_N, ROWS], tl.float32)
    squares = tl.zeros([BYTES, ROWS] if SPLIT == 1 else [SPLIT, BYTES, ROWS], tl.float32)
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
    ahead = _load_scales(
        scales, zeros, first, s, scales_n, scales_inside, num_outputs, width, SPLIT, UNROLL, NUM_GROUPS,
        HAS_ZEROS, READS,
    )  # fmt: skip
    wait_for_inputs(OVERLAPS)
    for i in range(first, last):
        now = ahead
        ahead = _load_scales(
            scales, zeros, i + 1, s, scales_n, scales_inside, num_outputs, width, SPLIT, UNROLL,
            NUM_GROUPS, HAS_ZEROS, READS,
        )  # fmt: skip
        for j in tl.static_range(UNROLL):
            g = (i * UNROLL + j) * SPLIT + s
            if SPLIT > 1:
                g = g[:, :, None]
            mask, mask_x = some_n, some_t
            if not EVEN:
                mask, mask_x = some_n & (g < NUM_GROUPS), some_t & (g < NUM_GROUPS)
            k = g * GROUP + rows_b
            if IS_INT4:
                k = g * GROUP + rows_b // 16 * 32 + rows_b % 16
            v = tl.load(tile_rows + k, mask=mask_x, other=0.0)
            if HAS_NORM:
                v, squares = _normed(v, norm, k, num_inputs, squares)
            high_v = v
            if IS_INT4:
                high_v = tl.load(tile_rows + k + 16, mask=mask_x, other=0.0)
                if HAS_NORM:
                    high_v, squares = _normed(high_v, norm, k + 16, num_inputs, squares)
            total = _add_groups(
                total, v, high_v, codes, now[j * READS * LOADS], now[j * READS * LOADS + LOADS - 1], g, tile_n, tile_b,
                width, num_inputs, mask, GROUP, IS_INT4, HAS_ZEROS,
            )  # fmt: skip
            if GATE:
                ups = _add_groups(
                    ups, v, high_v, codes, now[(j * READS + 1) * LOADS], now[(j * READS + 2) * LOADS - 1], g,
                    num_outputs + tile_n, tile_b, width, num_inputs, mask, GROUP, IS_INT4, HAS_ZEROS,
                )  # fmt: skip
    if SPLIT > 1:
        total, ups = tl.sum(total, axis=0), tl.sum(ups, axis=0)
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(tl.reshape(squares, [SPLIT * BYTES, ROWS]), axis=0) / num_inputs + eps)[None, :]
        total *= factor
        ups *= factor
    inside = inside_n[:, None] & inside_t[None, :]
    many_n = n[:, None] + tl.zeros([1, ROWS], tl.int32)
    offsets = t.to(tl.int64)[None, :] * num_outputs + many_n
    if IS_PART:
        _store_part(total, ups, out, offsets, num_rows, num_outputs, inside, GATE)
    else:
        addend = total
        if HAS_RESIDUAL:
            addend = tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
        finish(
            total, ups, addend, out, scales, bias, branch_scale, offsets, many_n, num_outputs, inside,
            False, HAS_BIAS, HAS_RESIDUAL, HAS_BRANCH_SCALE, GATE,
        )  # fmt: skip


@triton.jit
def _store_part(total, ups, out, offsets, num_rows, num_outputs, inside, GATE: tl.constexpr):
    """As `sum_parts` takes them."""
    READS: tl.constexpr = 2 if GATE else 1
    numbers = num_rows.to(tl.int64) * num_outputs
    part = out + tl.program_id(2) * READS * numbers
    tl.store(part + offsets, total, mask=inside)
    if GATE:
        tl.store(part + numbers + offsets, ups, mask=inside)


@triton.jit
def _load_scales(
    scales, zeros, i, s, n, inside, num_outputs, width, SPLIT: tl.constexpr, UNROLL: tl.constexpr,
    NUM_GROUPS: tl.constexpr, HAS_ZEROS: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """Of step i: for each of its turns, scales and zero points of gates, then of ups."""
    loaded = no_tiles()
    for j in tl.static_range(UNROLL):
        g = (i * UNROLL + j) * SPLIT + s
        mask = inside & (g < NUM_GROUPS)
        for r in tl.static_range(READS):
            place = g * width + r * num_outputs + n
            loaded += (tl.load(scales + place, mask=mask, other=0.0),)
            if HAS_ZEROS:
                loaded += (tl.load(zeros + place, mask=mask, other=0),)
    return loaded


@triton.jit
def _normed(v, norm, k, num_inputs, squares):
    """Inputs times the norm's weights, of which the whole product is scaled afterwards, and the sums of squares."""
    numbers = v.to(tl.float32)
    gain = tl.load(norm + k, mask=k < num_inputs, other=0.0).to(tl.float32)
    return (numbers * gain).to(v.dtype), squares + numbers * numbers


@triton.jit
def _add_groups(
    total, v, high_v, codes, scale, zero, g, n, b, width, num_inputs, mask, GROUP: tl.constexpr,
    IS_INT4: tl.constexpr, HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    """total + the products with each of the groups g."""
    if IS_INT4:
        slab = g * (GROUP // 32) + b // 16
        w = tl.load(codes + (slab.to(tl.int64) * width + n) * 16 + b % 16, mask=mask, other=0)
        if HAS_ZEROS:
            zero = zero.to(tl.int32)
        else:
            zero = tl.full(scale.shape, _SYMMETRIC, tl.int32)
        low, high = unpack_tile(w, tl.expand_dims(zero, -1), v.dtype)
        product = tl.dot(low, v, input_precision="ieee")
        product = tl.dot(high, high_v, product, input_precision="ieee")
    else:
        w = tl.load(codes + n.to(tl.int64) * num_inputs + g * GROUP + b, mask=mask, other=0.0).to(v.dtype)
        product = tl.dot(w, v, input_precision="ieee")
    return total + tl.expand_dims(scale, -1).to(tl.float32) * product
