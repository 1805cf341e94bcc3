"""Products of packed weights with a few tokens or many, on the CPU.

Each panel (`panels`) is read from memory once, at the machine's full read speed, which torch's products do not reach
for small batches. Up to 6 tokens share a pass over it, or 12 with AVX-512, and further passes find it in the cache; for
many tokens the same kernel is limited by the multipliers.
"""

import math

import numpy as np
from numba import njit, prange

from stellarbyte.ops.cpu import FAST_MATH, KEEP_COMPILED
from stellarbyte.ops.cpu.instructions import add_lanes, copy_half, copy_lanes, exp, gate_1, gate_2
from stellarbyte.ops.cpu.panels.floats import (
    TOKENS_OF_PAIRS,
    float32_panels,
    pair_product,
    pair_tile,
    tile_product,
    unpack_panel,
)
from stellarbyte.ops.cpu.panels.packed import most_packed, packed_product, packed_rows
from stellarbyte.ops.cpu.panels.sizes import LARGEST_TILE, PANEL_ROWS, tile_size
from stellarbyte.ops.cpu.panels.tiles import (
    COLUMNS_OF_A_TILE,
    ROWS_OF_A_TILE,
    TOKENS_AT_ONCE,
    configure_tiles,
    release_tiles,
    split_panel,
    split_row,
    tiled_1,
    tiled_2,
)

# T tokens, N rows, K columns, P panels of R rows

# How products are computed. PLAIN: as fast as float32 sums allow. INVARIANT: a row of x has the same product, bit for
# bit, whatever the other rows are and how many. TILED: many tokens by the matrix unit, see `ops.cpu.panels.tiles`.
# NumPy's integers, here and below: numba compiles a kernel again for each int that another kernel names in a call.
PLAIN, INVARIANT, TILED = (np.int64(number) for number in range(3))
MIN_TILED_TOKENS = 32  # below, splitting the panels costs more than the products

NO_ACTIVATION, SILU, GELU, GELU_TANH = (np.int64(number) for number in range(4))
ACTIVATIONS = {"silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH}


@njit(inline="always")
def _gelu(x, activation):
    if activation == GELU:
        return np.float32(0.5) * x * np.float32(1.0 + math.erf(x * 0.7071067811865476))
    inner = np.float32(0.7978845608028654) * (x + np.float32(0.044715) * x * x * x)
    return x / (np.float32(1.0) + exp(np.float32(-2.0) * inner))  # 0.5 · (1 + tanh(y)) = 1 / (1 + e^(-2y))


@njit(inline="always")
def write_tile(sums, num_tokens, first, panel, bias, addend, out, activation):
    """Write a tile of sums to the output. With an activation, rows 0..7 of a panel are gates of rows 8..15."""
    half = PANEL_ROWS // 2
    row = panel * PANEL_ROWS
    if len(bias):
        for t in range(num_tokens):
            add_lanes(sums, t * PANEL_ROWS, bias, row)
    if len(addend):
        for t in range(num_tokens):
            add_lanes(sums, t * PANEL_ROWS, addend[first + t], row)
    if activation == NO_ACTIVATION:
        width = min(PANEL_ROWS, out.shape[1] - row)
        for t in range(num_tokens):
            if width == PANEL_ROWS:
                copy_lanes(out[first + t], row, sums, t * PANEL_ROWS)
            else:
                for r in range(width):
                    out[first + t, row + r] = sums[t * PANEL_ROWS + r]
    elif activation == SILU:
        _write_silu(sums, num_tokens, first, panel, out)
    else:
        width = min(half, out.shape[1] - panel * half)
        for t in range(num_tokens):
            for r in range(width):
                value, up = sums[t * PANEL_ROWS + r], sums[t * PANEL_ROWS + half + r]
                out[first + t, panel * half + r] = _gelu(value, activation) * up


@njit(inline="always")
def _write_silu(sums, num_tokens, first, panel, out):
    half = PANEL_ROWS // 2
    row, width = panel * half, min(half, out.shape[1] - panel * half)
    for t in range(0, num_tokens, 2):
        number = min(2, num_tokens - t)
        if number == 2:
            gate_2(sums, t * PANEL_ROWS)
        else:
            gate_1(sums, t * PANEL_ROWS)
        for i in range(number):
            if width == half:
                copy_half(out[first + t + i], row, sums, t * PANEL_ROWS + i * half)
            else:
                for r in range(width):
                    out[first + t + i, row + r] = sums[t * PANEL_ROWS + i * half + r]


@njit(parallel=True, fastmath=FAST_MATH, nogil=True, cache=KEEP_COMPILED)
def linear(x, weight, bias, addend, out, activation, arithmetic, num_threads):
    """out = x · Wᵀ + bias + addend, or out = activation(gate) · up of that for a weight from `interleave_gated`.

    Args:
        x: [T, K] float32, contiguous.
        weight: (weights, scales, minima) of a `PackedWeight`.
        bias: [P · R] float32 in the weight's row order, or empty.
        addend: [T, P · R] float32 in the weight's row order, or [0, 0]; may be `out` if there is no activation.
        out: [T, N] float32, N rows or pairs of rows; overwritten.
        activation: NO_ACTIVATION, SILU, GELU or GELU_TANH.
        arithmetic: PLAIN, INVARIANT or TILED.
        num_threads: numba threads to use.
    """
    weights, scales, minima = weight
    num_panels, num_tokens = weights.shape[0], x.shape[0]
    if arithmetic == TILED and num_tokens >= MIN_TILED_TOKENS and x.shape[1] % COLUMNS_OF_A_TILE == 0:
        _tiled_linear(x, weight, bias, addend, out, activation, num_threads)
        return
    is_packed, is_invariant = num_tokens <= most_packed(weights), arithmetic == INVARIANT
    rows = packed_rows(x, weight, np.array([0, num_tokens]), num_threads)
    per_thread = (num_panels + 2 * num_threads - 1) // (2 * num_threads) * 2
    turns = (num_tokens + LARGEST_TILE - 1) // LARGEST_TILE
    ahead = 0 if most_packed(weights) > 0 else 2 * x.shape[1] * PANEL_ROWS  # no panels follow unpacked ones
    for thread in prange(num_threads):
        sums = np.empty((2, LARGEST_TILE * PANEL_ROWS), np.float32)
        buffer = np.empty((0 if is_packed else 2, x.shape[1], PANEL_ROWS), np.float32)
        for panel in range(thread * per_thread, min(num_panels, (thread + 1) * per_thread), 2):
            number, paired = min(2, num_panels - panel), 0
            if not is_packed:
                panels = float32_panels(weight, panel, number, buffer)
                if number == 2 and num_tokens >= TOKENS_OF_PAIRS:
                    for turn in range(turns):
                        tile = pair_tile(num_tokens - paired)
                        first = min(paired, num_tokens - tile)
                        pair_product(panels, x, first, tile, sums, ahead, turn, turns)
                        new = (paired - first) * PANEL_ROWS  # rows before it are written already
                        tile -= paired - first
                        for i in range(2):
                            write_tile(sums[i, new:], tile, paired, panel + i, bias, addend, out, activation)
                        paired += tile
            for i in range(number):
                first = paired
                while first < num_tokens:
                    tile = tile_size(num_tokens - first)
                    if is_packed:
                        packed_product(weight, panel + i, rows, first, tile, sums[0], is_invariant)
                    else:
                        tile_product(panels, scales, minima, i, x, first, tile, sums[0])
                    write_tile(sums[0], tile, first, panel + i, bias, addend, out, activation)
                    first += tile


@njit(parallel=True, fastmath=FAST_MATH, nogil=True, cache=KEEP_COMPILED)
def _tiled_linear(x, weight, bias, addend, out, activation, num_threads):
    """As `linear`, by the matrix unit: two panels at a time, each read once for all tokens."""
    weights, scales, minima = weight
    num_panels, (num_tokens, num_columns) = weights.shape[0], x.shape
    steps = num_columns // COLUMNS_OF_A_TILE
    num_blocks = (num_tokens + ROWS_OF_A_TILE - 1) // ROWS_OF_A_TILE
    blocks = np.zeros((num_blocks, steps, 2, ROWS_OF_A_TILE, COLUMNS_OF_A_TILE), np.uint16)
    for thread in prange(num_threads):
        for token in range(thread, num_tokens, num_threads):
            split_row(x, token, blocks, token // ROWS_OF_A_TILE, token % ROWS_OF_A_TILE)
    per_thread = (num_panels + 2 * num_threads - 1) // (2 * num_threads) * 2
    for thread in prange(num_threads):
        unpacked = np.empty((1, num_columns, PANEL_ROWS), np.float32)
        panels = np.zeros((2, steps, 2, COLUMNS_OF_A_TILE // 2, PANEL_ROWS), np.uint32)
        sums = np.empty((2, TOKENS_AT_ONCE * PANEL_ROWS), np.float32)
        configure_tiles()
        for panel in range(thread * per_thread, min(num_panels, (thread + 1) * per_thread), 2):
            number = min(2, num_panels - panel)
            for i in range(number):
                unpack_panel(weights, scales, minima, panel + i, num_columns, unpacked, 0)
                split_panel(unpacked[0], panels, i)
            for block in range(0, num_blocks, 2):
                if block + 1 < num_blocks:
                    tiled_2(blocks, block, panels, sums)
                else:
                    tiled_1(blocks, block, panels, sums)
                first = block * ROWS_OF_A_TILE
                tile = min(TOKENS_AT_ONCE, num_tokens - first)
                for i in range(number):
                    write_tile(sums[i], tile, first, panel + i, bias, addend, out, activation)
        release_tiles()
