"""The kernel of rows with an int4 matrix.

A turn multiplies slabs of 64 inputs. Each four bits of a slab's codes are a matrix of 16 inputs: as they lie in the
registers of the matrix units, three instructions turn the same four bits of two codes into numbers, and nothing moves
between threads.
"""

import triton
import triton.language as tl

from stellarbyte.ops.triton.grouped.parts import store_rows
from stellarbyte.ops.triton.grouped.unpack import group_scale, group_zero, unpack_quarters
from stellarbyte.ops.triton.overlap import no_tiles, wait_for_inputs

# T rows, N outputs, K inputs, S slabs at once


@triton.jit(do_not_specialize=["num_rows"])
def int4_rows_kernel(
    x, codes, groups, bias, residual, branch_scale, out, num_rows, num_outputs, num_inputs,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, UNROLL: tl.constexpr,
    NUM_STEPS: tl.constexpr, STEPS_OF_PART: tl.constexpr, EVEN: tl.constexpr, SCALES_FIRST: tl.constexpr,
    IS_HALF: tl.constexpr, HAS_REAL_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_BRANCH_SCALE: tl.constexpr, IS_PART: tl.constexpr, GATE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Tiles are [S, N, 16] and [S, 16, T]; without S where one slab is multiplied at once, for wider matrix units."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, 16)
    width = num_outputs * 2 if GATE else num_outputs
    rows = x + t.to(tl.int64) * num_inputs
    total = tl.zeros([BLOCK_N, ROWS] if SPLIT == 1 else [SPLIT, BLOCK_N, ROWS], tl.float32)
    if SPLIT == 1:
        s, n_of_groups, n_of_codes, b_of_codes = 0, n, n[:, None], b[None, :]
        rows_of_x, t_of_x, b_of_x = rows[None, :], t[None, :], b[:, None]
    else:
        s, n_of_groups, n_of_codes, b_of_codes = (
            tl.arange(0, SPLIT)[:, None],
            n[None, :],
            n[None, :, None],
            b[None, None, :],
        )
        rows_of_x, t_of_x, b_of_x = rows[None, None, :], t[None, None, :], b[None, :, None]
    first = tl.program_id(2) * STEPS_OF_PART
    last = tl.minimum(first + STEPS_OF_PART, NUM_STEPS)
    ups = total
    wait_for_inputs(OVERLAPS)
    for i in range(first, last):
        for j in tl.static_range(UNROLL):
            h = (i * UNROLL + j) * SPLIT + s
            h_of_tile = h
            if SPLIT > 1:
                h_of_tile = h[:, :, None]
            quarters = no_tiles()
            for q in tl.static_range(4):
                k = h_of_tile * 64 + q * 16 + b_of_x
                inside = t_of_x < num_rows
                if not EVEN:
                    inside &= k < num_inputs
                quarters += (tl.load(rows_of_x + k, mask=inside, other=0.0),)
            place = codes + (h_of_tile.to(tl.int64) * width + n_of_codes) * 16 + b_of_codes
            inside, inside_groups = n_of_codes < num_outputs, n_of_groups < num_outputs
            if not EVEN:
                inside, inside_groups = inside & (h_of_tile * 64 < num_inputs), inside_groups & (h * 64 < num_inputs)
            place_of_groups = groups + (h * 64 // GROUP) * width + n_of_groups
            # Of groups of 32, a slab holds two, of which the last slab may lack one.
            to_next = tl.where(h * 64 + 32 < num_inputs, width, 0) if GROUP == 32 else 0
            total = _add_slabs(
                total, quarters, place, inside, place_of_groups, to_next, inside_groups, GROUP, SCALES_FIRST, IS_HALF,
                HAS_REAL_ZEROS,
            )  # fmt: skip
            if GATE:
                ups = _add_slabs(
                    ups, quarters, place + tl.cast(num_outputs, tl.int64) * 16, inside, place_of_groups + num_outputs,
                    to_next, inside_groups, GROUP, SCALES_FIRST, IS_HALF, HAS_REAL_ZEROS,
                )  # fmt: skip
    if SPLIT > 1:
        total, ups = tl.sum(total, axis=0), tl.sum(ups, axis=0)
    store_rows(
        total, ups, out, bias, residual, branch_scale, n, t, num_rows, num_outputs, ROWS,
        HAS_BIAS, HAS_RESIDUAL, HAS_BRANCH_SCALE, IS_PART, GATE,
    )  # fmt: skip


@triton.jit
def _add_slabs(
    total, quarters, place, inside, place_of_groups, to_next, inside_groups, GROUP: tl.constexpr,
    SCALES_FIRST: tl.constexpr, IS_HALF: tl.constexpr, HAS_REAL_ZEROS: tl.constexpr,
):  # fmt: skip
    """total + the products with the slabs at `place`; low and high are of the first and the second 32 inputs."""
    element: tl.constexpr = quarters[0].dtype
    codes = tl.load(place, mask=inside, other=0)
    low_words = tl.load(place_of_groups, mask=inside_groups, other=0)
    high_words = low_words
    if GROUP == 32:
        high_words = tl.load(place_of_groups + to_next, mask=inside_groups, other=0)
    low_zeros = tl.expand_dims(group_zero(low_words, HAS_REAL_ZEROS), -1)
    high_zeros = tl.expand_dims(group_zero(high_words, HAS_REAL_ZEROS), -1)
    w = unpack_quarters(codes, low_zeros, high_zeros, element)
    low_scales = tl.expand_dims(group_scale(low_words, IS_HALF), -1)
    high_scales = tl.expand_dims(group_scale(high_words, IS_HALF), -1)
    if SCALES_FIRST:
        low, high = low_scales.to(element), high_scales.to(element)
        total = tl.dot(w[0] * low, quarters[0], total, input_precision="ieee")
        total = tl.dot(w[1] * low, quarters[1], total, input_precision="ieee")
        total = tl.dot(w[2] * high, quarters[2], total, input_precision="ieee")
        return tl.dot(w[3] * high, quarters[3], total, input_precision="ieee")
    product = tl.dot(w[0], quarters[0], input_precision="ieee")
    product = tl.dot(w[1], quarters[1], product, input_precision="ieee")
    if GROUP == 32:
        total += low_scales * product
        product = tl.dot(w[2], quarters[2], input_precision="ieee")
    else:
        product = tl.dot(w[2], quarters[2], product, input_precision="ieee")
    product = tl.dot(w[3], quarters[3], product, input_precision="ieee")
    return total + high_scales * product
