"""Expert products of several tokens: tiles of pairs that share an expert, so that a tile reads its weights once.

A program finds its tile in the numbers of each expert's pairs. The grid has room for the most tiles that the pairs can
need, so that a captured launch serves any choice; the programs left over end at once. The weights are the wide operand
of the matrix units, the rows the narrow one, as in `linear`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from stellarbyte.model.mlp import ClampedSwiglu
from stellarbyte.ops.triton.gates import NO_GATE, gate_constants
from stellarbyte.ops.triton.linear import finish
from stellarbyte.ops.triton.moe.scratch import ExpertScratch
from stellarbyte.ops.triton.overlap import overlapping, wait_for_inputs, wait_then_let_next_begin
from stellarbyte.ops.triton.weights import ExpertWeight

# T tokens, J chosen experts of a token, P = T · J pairs, E experts, N outputs, K inputs
# C hidden size, I intermediate size of an expert

_COLUMNS = 1024


class GroupTile(NamedTuple):
    """Pairs, outputs and inputs that a program multiplies at once, and how."""

    rows: int
    block_n: int  # of gates and as many ups, or of outputs
    block_k: int
    num_warps: int
    num_stages: int


def gate_up_tile(num_tokens: int, top_k: int, num_experts: int, dtype: torch.dtype) -> GroupTile:
    rows = _rows(num_tokens, top_k, num_experts, 2)
    if num_tokens > 8:
        rows = max(16, rows)
    if rows <= 16:
        tile = GroupTile(rows, 64, 128, 4, 3)
    elif rows == 32:
        tile = GroupTile(rows, 64, 64, 4, 4)
    else:
        tile = GroupTile(rows, 64, 64, 4 if rows == 64 else 8, 3)
    return _of_dtype(tile, dtype)


def down_tile(num_tokens: int, top_k: int, num_experts: int, dtype: torch.dtype) -> GroupTile:
    rows = _rows(num_tokens, top_k, num_experts, 1.5)
    if rows == 8:
        tile = GroupTile(rows, 64, 128, 4, 4)
    elif rows <= 32:
        tile = GroupTile(rows, 64, 64, 4, 4)
    else:
        tile = GroupTile(rows, 128, 64, 4 if rows == 64 else 8, 3)
    return _of_dtype(tile, dtype)


def _rows(num_tokens: int, top_k: int, num_experts: int, of_mean: float) -> int:
    """Enough for more than the mean number of an expert's pairs, so that few experts need a second tile."""
    mean = num_tokens * top_k / num_experts
    return min(128, max(8, triton.next_power_of_2(round(of_mean * mean))))


def invariant_tile(dtype: torch.dtype) -> GroupTile:
    """The same for any number of tokens: the bits of a pair do not depend on the other pairs."""
    return _of_dtype(GroupTile(32, 64, 64, 4, 4), dtype)


def _of_dtype(tile: GroupTile, dtype: torch.dtype) -> GroupTile:
    """float32 takes twice the memory for each number."""
    return tile._replace(block_k=tile.block_k // 2) if dtype == torch.float32 else tile


def most_tiles(num_tokens: int, top_k: int, num_experts: int, rows: int) -> int:
    """Largest number of tiles of `rows` pairs, whatever the choice. An expert has at most one pair of each token."""
    num_pairs = num_tokens * top_k
    touched = min(num_pairs, num_experts)
    return min(touched + (num_pairs - touched) // rows, touched * triton.cdiv(num_tokens, rows))


def gate_up(
    x_TC: torch.Tensor,
    weight: ExpertWeight,
    scratch: ExpertScratch,
    *,
    top_k: int,
    gate: int,
    swiglu: ClampedSwiglu | None = None,
    tile: GroupTile,
) -> None:
    """Write the gated hidden rows of all pairs to the scratch, after `route`."""
    constants = gate_constants(gate, swiglu)
    _launch(x_TC, scratch.hidden, weight, scratch, num_tokens=len(x_TC), top_k=top_k, gate=constants, tile=tile)


def down(num_tokens: int, weight: ExpertWeight, scratch: ExpertScratch, *, top_k: int, tile: GroupTile) -> None:
    """Write the outputs of all pairs, times their gates, to the scratch, after `gate_up`."""
    hidden, no_gate = scratch.hidden, gate_constants(NO_GATE, None)
    _launch(hidden, scratch.outputs, weight, scratch, num_tokens=num_tokens, top_k=top_k, gate=no_gate, tile=tile)


def combine(
    out_TC: torch.Tensor,
    scratch: ExpertScratch,
    *,
    top_k: int,
    residual_TC: torch.Tensor | None,
    branch_scale_C: torch.Tensor | None,
) -> None:
    """out = residual + branch_scale · the sum of each token's pairs, after `down`. Ends the layer: counts are 0."""
    num_tokens, width = out_TC.shape
    num_experts = len(scratch.counts)
    _combine_kernel[(num_tokens, triton.cdiv(width, _COLUMNS))](
        scratch.outputs, out_TC if residual_TC is None else residual_TC,
        out_TC if branch_scale_C is None else branch_scale_C, out_TC, scratch.counts, width, num_experts, TOP_K=top_k,
        EXPERTS=triton.next_power_of_2(num_experts), BLOCK=_COLUMNS, HAS_RESIDUAL=residual_TC is not None,
        HAS_BRANCH_SCALE=branch_scale_C is not None, **overlapping(out_TC.device),
    )  # fmt: skip


def _launch(
    x: torch.Tensor,
    out: torch.Tensor,
    weight: ExpertWeight,
    scratch: ExpertScratch,
    *,
    num_tokens: int,
    top_k: int,
    gate: dict[str, float],
    tile: GroupTile,
) -> None:
    num_experts, num_outputs, num_inputs = weight.matrix_ENK.shape
    num_outputs //= 2 if gate["GATE"] else 1
    block_k = min(tile.block_k, max(16, triton.next_power_of_2(num_inputs)))
    tiles = most_tiles(num_tokens, top_k, num_experts, tile.rows)
    # The tiles of one expert run together, and find its weights in the cache.
    _grouped_kernel[(triton.cdiv(num_outputs, tile.block_n), tiles)](
        x, weight.matrix_ENK, x if weight.scales_EN is None else weight.scales_EN,
        x if weight.bias_EN is None else weight.bias_EN, scratch.counts, scratch.lists, scratch.gates, out,
        num_tokens, num_experts, num_outputs, num_inputs, TOP_K=top_k, EXPERTS=triton.next_power_of_2(num_experts),
        ROWS=tile.rows, BLOCK_N=tile.block_n, BLOCK_K=block_k, NUM_TILES=triton.cdiv(num_inputs, block_k),
        EVEN_K=num_inputs % block_k == 0, HAS_SCALES=weight.scales_EN is not None,
        HAS_BIAS=weight.bias_EN is not None, **gate, num_warps=tile.num_warps, num_stages=tile.num_stages,
        **overlapping(x.device),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _grouped_kernel(
    x, weight, scales, bias, counts, lists, gates, out, num_tokens, num_experts, num_outputs, num_inputs,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_TILES: tl.constexpr, EVEN_K: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr,
    GATE: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """With GATE the first product, of tokens' rows; without, the second one, of pairs' rows, times their gates."""
    if GATE:
        wait_then_let_next_begin(OVERLAPS)  # the second product finds its tiles before it waits
    tile = tl.program_id(1)
    e = tl.arange(0, EXPERTS)
    count = tl.load(counts + e, mask=e < num_experts, other=0, cache_modifier=".cg")
    tiles = (count + (ROWS - 1)) // ROWS
    ends = tl.cumsum(tiles, axis=0)
    if tile >= tl.sum(tiles, axis=0):
        return
    expert = tl.sum((ends <= tile).to(tl.int32), axis=0)
    begin = (tile - tl.sum(tl.where(e < expert, tiles, 0), axis=0)) * ROWS
    r = begin + tl.arange(0, ROWS)
    inside_r = r < tl.sum(tl.where(e == expert, count, 0), axis=0)
    expert = expert.to(tl.int64)
    pair = tl.load(lists + expert * num_tokens + r, mask=inside_r, other=0, cache_modifier=".cg").to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = n < num_outputs
    first_output = expert * num_outputs
    row = pair
    if GATE:
        first_output *= 2
        row = pair // TOP_K
    else:
        wait_for_inputs(OVERLAPS)
    element = out.dtype.element_ty
    w_row = weight + (first_output + n)[:, None] * num_inputs
    to_ups = num_outputs * num_inputs
    x_row = x + row[None, :] * num_inputs
    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    ups = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for i in range(NUM_TILES):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        inside_k = k < num_inputs
        if EVEN_K:
            mask = inside_n[:, None]
            v = tl.load(x_row + k[:, None], mask=inside_r[None, :], other=0.0)
        else:
            mask = inside_n[:, None] & inside_k[None, :]
            v = tl.load(x_row + k[:, None], mask=inside_r[None, :] & inside_k[:, None], other=0.0)
        w = tl.load(w_row + k[None, :], mask=mask, other=0.0).to(element)
        total = tl.dot(w, v, total, input_precision="ieee")
        if GATE:
            w_up = tl.load(w_row + to_ups + k[None, :], mask=mask, other=0.0).to(element)
            ups = tl.dot(w_up, v, ups, input_precision="ieee")
    many_n = n[:, None] + tl.zeros([1, ROWS], tl.int32)
    offsets, inside = pair[None, :] * num_outputs + many_n, inside_n[:, None] & inside_r[None, :]
    if GATE:
        finish(
            total, ups, total, out, scales + first_output, bias + first_output, x, offsets, many_n, num_outputs, inside,
            HAS_SCALES, HAS_BIAS, False, False, GATE, ALPHA, LIMIT,
        )  # fmt: skip
    else:  # a pair's gate multiplies its expert's bias, too
        if HAS_SCALES:
            total *= tl.load(scales + first_output + n, mask=inside_n, other=0.0)[:, None]
        if HAS_BIAS:
            total += tl.load(bias + first_output + n, mask=inside_n, other=0.0).to(tl.float32)[:, None]
        total *= tl.load(gates + pair, mask=inside_r, other=0.0)[None, :]
        tl.store(out + offsets, total.to(element), mask=inside)


@triton.jit
def _combine_kernel(
    outputs, residual, branch_scale, out, counts, width, num_experts, TOP_K: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BRANCH_SCALE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    offsets = token * width + column
    addend = tl.zeros([BLOCK], tl.float32)
    if HAS_RESIDUAL:
        addend = tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        total += tl.load(outputs + (token * TOP_K + j) * width + column, mask=inside, other=0.0).to(tl.float32)
    finish(
        total, total, addend, out, outputs, outputs, branch_scale, offsets, column, width, inside,
        False, False, HAS_RESIDUAL, HAS_BRANCH_SCALE, 0,
    )  # fmt: skip
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        e = tl.arange(0, EXPERTS)
        tl.store(counts + e, tl.zeros([EXPERTS], tl.int32), mask=e < num_experts)
