"""Expert products of very few tokens: each pair of a token and an expert reads its expert's weights.

So few pairs rarely share an expert, every weight is used once, and the products are summed without the matrix units.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from stellarbyte.model.mlp import ClampedSwiglu
from stellarbyte.ops.triton.gates import gate_constants
from stellarbyte.ops.triton.linear import as_float32, finish, load_weights
from stellarbyte.ops.triton.moe.scratch import ExpertScratch
from stellarbyte.ops.triton.overlap import (
    let_next_begin,
    no_tiles,
    overlapping,
    wait_for_inputs,
    wait_then_let_next_begin,
)
from stellarbyte.ops.triton.weights import ExpertWeight

# T tokens, J chosen experts of a token, P = T · J pairs, E experts, N outputs, K inputs
# C hidden size, I intermediate size of an expert


class PairTile(NamedTuple):
    """Outputs and inputs that a program reads at once."""

    block_n: int
    block_k: int
    num_warps: int = 4
    ahead: int = 1  # tiles that are loaded ahead


def gate_up_tile(num_inputs: int) -> PairTile:
    return PairTile(2, min(512, max(16, triton.next_power_of_2(num_inputs))), 1, 4)


def down_tile(num_inputs: int) -> PairTile:
    if num_inputs > 1024:  # fewer tiles, as their loop is unrolled
        return PairTile(2, 1024, 2, 2)
    return PairTile(2, min(256, max(16, triton.next_power_of_2(num_inputs))), 1, 8)


def gate_up(
    x_TC: torch.Tensor,
    weight: ExpertWeight,
    scratch: ExpertScratch,
    *,
    top_k: int,
    gate: int,
    swiglu: ClampedSwiglu | None = None,
    tile: PairTile,
) -> None:
    """Write the gated hidden rows of all pairs to the scratch, after `route`."""
    num_tokens, num_inputs = x_TC.shape
    width = weight.matrix_ENK.shape[1] // 2
    _gate_up_kernel[(triton.cdiv(width, tile.block_n), num_tokens * top_k)](
        x_TC, weight.matrix_ENK, x_TC if weight.scales_EN is None else weight.scales_EN,
        x_TC if weight.bias_EN is None else weight.bias_EN, scratch.chosen, scratch.hidden, width, num_inputs,
        TOP_K=top_k, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, NUM_TILES=triton.cdiv(num_inputs, tile.block_k),
        AHEAD=tile.ahead, EVEN_K=num_inputs % tile.block_k == 0, HAS_SCALES=weight.scales_EN is not None,
        HAS_BIAS=weight.bias_EN is not None, **gate_constants(gate, swiglu), num_warps=tile.num_warps,
        **overlapping(x_TC.device),
    )  # fmt: skip


def down(
    out_TC: torch.Tensor,
    weight: ExpertWeight,
    scratch: ExpertScratch,
    *,
    top_k: int,
    residual_TC: torch.Tensor | None,
    branch_scale_C: torch.Tensor | None,
    tile: PairTile,
) -> None:
    """out = residual + branch_scale · the sum of a token's pairs by their gates, after `gate_up`."""
    num_tokens, num_outputs = out_TC.shape
    num_inputs = weight.matrix_ENK.shape[2]
    _down_kernel[(triton.cdiv(num_outputs, tile.block_n), num_tokens)](
        scratch.hidden, weight.matrix_ENK, out_TC if weight.scales_EN is None else weight.scales_EN,
        out_TC if weight.bias_EN is None else weight.bias_EN, scratch.chosen, scratch.gates,
        out_TC if residual_TC is None else residual_TC, out_TC if branch_scale_C is None else branch_scale_C, out_TC,
        num_outputs, num_inputs, TOP_K=top_k, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        NUM_TILES=triton.cdiv(num_inputs, tile.block_k), AHEAD=tile.ahead, EVEN_K=num_inputs % tile.block_k == 0,
        HAS_SCALES=weight.scales_EN is not None, HAS_BIAS=weight.bias_EN is not None,
        HAS_RESIDUAL=residual_TC is not None, HAS_BRANCH_SCALE=branch_scale_C is not None, num_warps=tile.num_warps,
        **overlapping(out_TC.device),
    )  # fmt: skip


@triton.jit
def _gate_up_kernel(
    x, weight, scales, bias, chosen, hidden, num_outputs, num_inputs, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, NUM_TILES: tl.constexpr, AHEAD: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, GATE: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Some gates and ups of one pair; weights are loaded ahead."""
    wait_then_let_next_begin(OVERLAPS)
    pair = tl.program_id(1)
    expert = tl.load(chosen + pair).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = n < num_outputs
    tile = weight + (expert * (2 * num_outputs) + n)[:, None] * num_inputs + k[None, :]
    to_ups = num_outputs * num_inputs
    row = x + (pair // TOP_K) * num_inputs
    loaded = no_tiles()
    for i in tl.static_range(AHEAD if AHEAD < NUM_TILES else NUM_TILES):
        inside_k = i * BLOCK_K + k < num_inputs
        loaded += (
            load_weights(tile + i * BLOCK_K, inside, inside_k, EVEN_K),
            load_weights(tile + to_ups + i * BLOCK_K, inside, inside_k, EVEN_K),
        )
    total = tl.zeros([BLOCK_N], tl.float32)
    ups = tl.zeros([BLOCK_N], tl.float32)
    for i in tl.static_range(NUM_TILES):
        v = tl.load(row + i * BLOCK_K + k, mask=i * BLOCK_K + k < num_inputs, other=0.0).to(tl.float32)[None, :]
        if i + AHEAD < NUM_TILES:
            inside_k = (i + AHEAD) * BLOCK_K + k < num_inputs
            loaded += (
                load_weights(tile + (i + AHEAD) * BLOCK_K, inside, inside_k, EVEN_K),
                load_weights(tile + to_ups + (i + AHEAD) * BLOCK_K, inside, inside_k, EVEN_K),
            )
        total += tl.sum(as_float32(loaded[2 * i]) * v, axis=1)
        ups += tl.sum(as_float32(loaded[2 * i + 1]) * v, axis=1)
    finish(
        total, ups, total, hidden, scales + expert * (2 * num_outputs), bias + expert * (2 * num_outputs), x,
        pair * num_outputs + n, n, num_outputs, inside, HAS_SCALES, HAS_BIAS, False, False, GATE, ALPHA, LIMIT,
    )  # fmt: skip


@triton.jit
def _load_tile(
    weight, chosen, i: tl.constexpr, n, num_outputs, num_inputs, inside, BLOCK_K: tl.constexpr,
    NUM_TILES: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Tile number i of a token's experts, one after the other."""
    expert = tl.load(chosen + i // NUM_TILES, cache_modifier=".cg").to(tl.int64)
    k = (i % NUM_TILES) * BLOCK_K + tl.arange(0, BLOCK_K)
    return load_weights(
        weight + (expert * num_outputs + n)[:, None] * num_inputs + k[None, :], inside, k < num_inputs, EVEN_K
    )


@triton.jit
def _down_kernel(
    hidden, weight, scales, bias, chosen, gates, residual, branch_scale, out, num_outputs, num_inputs,
    TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_TILES: tl.constexpr, AHEAD: tl.constexpr,
    EVEN_K: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_BRANCH_SCALE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Some outputs of one token over all of its experts; weights are loaded ahead, the first ones while
    `_gate_up_kernel` still runs, which begins after the choice."""
    let_next_begin(OVERLAPS)
    first_pair = tl.program_id(1) * TOP_K
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < num_outputs
    loaded = no_tiles()
    for i in tl.static_range(AHEAD if AHEAD < TOP_K * NUM_TILES else TOP_K * NUM_TILES):
        loaded += (
            _load_tile(
                weight, chosen + first_pair, i, n, num_outputs, num_inputs, inside, BLOCK_K, NUM_TILES, EVEN_K
            ),
        )  # fmt: skip
    wait_for_inputs(OVERLAPS)
    offsets = tl.program_id(1) * num_outputs + n
    addend = tl.zeros([BLOCK_N], tl.float32)
    if HAS_RESIDUAL:  # early, as nothing hides its latency at the end
        addend = tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)  # summed across threads only once
    biases = tl.zeros([BLOCK_N], tl.float32)
    for i in tl.static_range(TOP_K * NUM_TILES):
        pair, k = first_pair + i // NUM_TILES, (i % NUM_TILES) * BLOCK_K + tl.arange(0, BLOCK_K)
        v = tl.load(hidden + pair * num_inputs + k, mask=k < num_inputs, other=0.0).to(tl.float32)
        gate = tl.load(gates + pair)
        v *= gate
        if HAS_BIAS:
            if i % NUM_TILES == 0:
                expert = tl.load(chosen + pair)
                biases += gate * tl.load(bias + expert * num_outputs + n, mask=inside, other=0.0).to(tl.float32)
        if i + AHEAD < TOP_K * NUM_TILES:
            loaded += (
                _load_tile(
                    weight, chosen + first_pair, i + AHEAD, n, num_outputs, num_inputs, inside, BLOCK_K, NUM_TILES,
                    EVEN_K,
                ),
            )  # fmt: skip
        product = as_float32(loaded[i]) * v[None, :]
        if HAS_SCALES:
            expert = tl.load(chosen + pair)
            product *= tl.load(scales + expert * num_outputs + n, mask=inside, other=0.0)[:, None]
        products += product
    total = tl.sum(products, axis=1)
    if HAS_BIAS:
        total += biases
    finish(
        total, total, addend, out, scales, residual, branch_scale, offsets, n, num_outputs, inside,
        False, False, HAS_RESIDUAL, HAS_BRANCH_SCALE, 0,
    )  # fmt: skip
