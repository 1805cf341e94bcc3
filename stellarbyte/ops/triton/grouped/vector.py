"""The product of one row with an int4 matrix: every weight is used once, without the matrix units.

A thread reads 16 bytes, the codes of 32 inputs of an output. Its 32 inputs stay in registers for the same slab of
several outputs, and scale and zero point are applied to sums over a slab's groups: Σ s (c - z) x = s (Σ c x - z Σ x).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from stellarbyte.ops.triton.gates import NO_GATE
from stellarbyte.ops.triton.grouped.unpack import group_scale, group_zero, unpack_words
from stellarbyte.ops.triton.grouped.weights import SLAB, GroupedWeight
from stellarbyte.ops.triton.linear import finish
from stellarbyte.ops.triton.overlap import let_next_begin, no_tiles, overlapping, wait_for_inputs

# N outputs, K inputs, H slabs of 64 inputs, W = 8 words of a slab's codes


class VectorTile(NamedTuple):
    """Of a program: outputs that it reads side by side, how often, slabs at once, and warps."""

    block_n: int
    repeats: int  # with a gate as many gates and as many ups
    slabs: int
    num_warps: int


def vector_tile(num_inputs: int) -> VectorTile:
    """Long reads of few outputs: registers limit the programs of a multiprocessor, and so the reads on their way."""
    slabs = min(32, triton.next_power_of_2(triton.cdiv(num_inputs, SLAB)))
    return VectorTile(8, 1, slabs, max(1, min(4, slabs // 4)))


def vector_product(
    x_1K: torch.Tensor,
    weight: GroupedWeight,
    out_1N: torch.Tensor,
    *,
    norm_K: torch.Tensor | None = None,
    eps: float = 0.0,
    gate: int = NO_GATE,
    residual_1N: torch.Tensor | None = None,
    branch_scale_N: torch.Tensor | None = None,
    tile: VectorTile,
) -> None:
    """As `linear.linear`, for one contiguous row."""
    num_outputs, num_inputs = weight.num_outputs // (2 if gate else 1), weight.num_inputs
    num_slabs = triton.cdiv(num_inputs, SLAB)
    _vector_kernel[(triton.cdiv(num_outputs, tile.block_n * tile.repeats),)](
        x_1K,
        weight.codes.view(torch.int32),
        weight.groups_GN,
        x_1K if weight.bias_N is None else weight.bias_N,
        x_1K if norm_K is None else norm_K,
        x_1K if residual_1N is None else residual_1N,
        x_1K if branch_scale_N is None else branch_scale_N,
        out_1N,
        num_outputs,
        num_inputs,
        eps,
        BLOCK_N=tile.block_n,
        REPEATS=tile.repeats,
        SLABS=tile.slabs,
        NUM_TILES=triton.cdiv(num_slabs, tile.slabs),
        EVEN=num_inputs % (SLAB * tile.slabs) == 0 and num_outputs % (tile.block_n * tile.repeats) == 0,
        GROUP=weight.group_size,
        IS_HALF=weight.scale_dtype == torch.float16,
        HAS_REAL_ZEROS=weight.has_real_zeros,
        HAS_BIAS=weight.bias_N is not None,
        HAS_NORM=norm_K is not None,
        HAS_RESIDUAL=residual_1N is not None,
        HAS_BRANCH_SCALE=branch_scale_N is not None,
        GATE=gate,
        num_warps=tile.num_warps,
        **overlapping(x_1K.device),
    )


@triton.jit
def _vector_kernel(
    x, codes, groups, bias, norm, residual, branch_scale, out, num_outputs, num_inputs, eps,
    BLOCK_N: tl.constexpr, REPEATS: tl.constexpr, SLABS: tl.constexpr, NUM_TILES: tl.constexpr, EVEN: tl.constexpr,
    GROUP: tl.constexpr, IS_HALF: tl.constexpr, HAS_REAL_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BRANCH_SCALE: tl.constexpr, GATE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Some outputs; the next slabs' numbers are loaded ahead, the first ones while the row is still being computed."""
    let_next_begin(OVERLAPS)
    READS: tl.constexpr = 2 * REPEATS if GATE else REPEATS  # with a gate, the ups after the gates
    GROUPS: tl.constexpr = 2 if GROUP == 32 else 1  # of a slab
    width = num_outputs * 2 if GATE else num_outputs
    first = tl.program_id(0) * (BLOCK_N * REPEATS) + tl.arange(0, BLOCK_N)
    h = tl.arange(0, SLABS)
    loaded, groups_ahead = no_tiles(), no_tiles()
    for r in tl.static_range(READS):
        loaded += (_load_words(codes, first, r, h, num_outputs, width, num_inputs, BLOCK_N, REPEATS, EVEN),)
        groups_ahead += _load_groups(groups, first, r, h, num_outputs, width, num_inputs, BLOCK_N, REPEATS, GROUP)
    wait_for_inputs(OVERLAPS)
    totals = no_tiles()
    for _ in tl.static_range(READS):
        totals += (tl.zeros([SLABS, BLOCK_N], tl.float32),)
    squares = tl.zeros([SLABS], tl.float32)
    for i in tl.static_range(NUM_TILES):
        here = i * SLABS + h
        v = _load_row(x, here, num_inputs)
        if HAS_NORM:
            squares += _sum_of_products(v, v)
            v = _products(v, _load_row(norm, here, num_inputs))
        sums = _sums_of(v, GROUPS)
        now, groups_now = loaded, groups_ahead
        loaded, groups_ahead = no_tiles(), no_tiles()
        if i + 1 < NUM_TILES:
            for r in tl.static_range(READS):
                loaded += (
                    _load_words(codes, first, r, here + SLABS, num_outputs, width, num_inputs, BLOCK_N, REPEATS, EVEN),
                )
                groups_ahead += _load_groups(
                    groups, first, r, here + SLABS, num_outputs, width, num_inputs, BLOCK_N, REPEATS, GROUP
                )
        before, totals = totals, no_tiles()
        for r in tl.static_range(READS):
            codes_sums = _sums_of_codes(now[r], v, GROUPS)
            total = before[r]
            for g in tl.static_range(GROUPS):
                words = groups_now[r * GROUPS + g]
                zero = 16.0 + group_zero(words, HAS_REAL_ZEROS).to(tl.float32)
                total += group_scale(words, IS_HALF) * (codes_sums[g] - zero * sums[g][:, None])
            totals += (total,)
    factor = 1.0
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(squares, axis=0) / num_inputs + eps)
    for r in tl.static_range(REPEATS):
        n = first + r * BLOCK_N
        inside = n < num_outputs
        addend = tl.zeros([BLOCK_N], tl.float32)
        if HAS_RESIDUAL:
            addend = tl.load(residual + n, mask=inside, other=0.0).to(tl.float32)
        total = tl.sum(totals[r], axis=0) * factor
        ups = total
        if GATE:
            ups = tl.sum(totals[REPEATS + r], axis=0) * factor
        finish(
            total, ups, addend, out, bias, bias, branch_scale, n, n, num_outputs, inside,
            False, HAS_BIAS, HAS_RESIDUAL, HAS_BRANCH_SCALE, GATE,
        )  # fmt: skip


@triton.jit
def _load_words(
    codes, first, r: tl.constexpr, h, num_outputs, width, num_inputs, BLOCK_N: tl.constexpr, REPEATS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """int32 [H, N, W]."""
    n = first + (r % REPEATS) * BLOCK_N
    row = h.to(tl.int64)[:, None] * width + ((r // REPEATS) * num_outputs + n)[None, :]
    place = codes + row[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    if EVEN:
        return tl.load(place, eviction_policy="evict_first")
    else:
        inside = (n < num_outputs)[None, :] & (h * 64 < num_inputs)[:, None]
        return tl.load(place, mask=inside[:, :, None], other=0, eviction_policy="evict_first")


@triton.jit
def _load_groups(
    groups, first, r: tl.constexpr, h, num_outputs, width, num_inputs, BLOCK_N: tl.constexpr, REPEATS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """[H, N] words of each group of a slab."""
    n = first + (r % REPEATS) * BLOCK_N
    loaded = no_tiles()
    for group in tl.static_range(2 if GROUP == 32 else 1):
        g = h * 64 // GROUP + group
        inside = (n < num_outputs)[None, :] & (g * GROUP < num_inputs)[:, None]
        place = g.to(tl.int64)[:, None] * width + (r // REPEATS) * num_outputs + n[None, :]
        loaded += (tl.load(groups + place, mask=inside, other=0),)
    return loaded


@triton.jit
def _load_row(x, h, num_inputs):
    """float32 [H, W] × 8, as the codes of `unpack_words`: word w has those of the neighbours 2 w and 2 w + 1 in each
    quarter of a slab; of both, first and third quarters, then second and fourth ones."""
    first = _load_pair(x, h, 0, num_inputs)
    second = _load_pair(x, h, 1, num_inputs)
    third = _load_pair(x, h, 2, num_inputs)
    fourth = _load_pair(x, h, 3, num_inputs)
    return first[0], third[0], first[1], third[1], second[0], fourth[0], second[1], fourth[1]


@triton.jit
def _load_pair(x, h, quarter: tl.constexpr, num_inputs):
    """float32 [H, W] × 2"""
    word = tl.arange(0, 8)[None, :]
    mask = (h * 64 + quarter * 16 < num_inputs)[:, None] & (word < 8)
    if x.dtype.element_ty == tl.bfloat16:  # two numbers in one read
        pairs = tl.load(x.to(tl.pointer_type(tl.int32)) + h[:, None] * 32 + quarter * 8 + word, mask=mask, other=0)
        return (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)
    else:
        place = x + h[:, None] * 64 + quarter * 16 + 2 * word
        return (
            tl.load(place, mask=mask, other=0.0).to(tl.float32), tl.load(place + 1, mask=mask, other=0.0).to(tl.float32)
        )  # fmt: skip


@triton.jit
def _sums_of_codes(words, v, GROUPS: tl.constexpr):
    """[H, N] for each group of slabs: the sums of (16 + code) · v."""
    codes = unpack_words(words)
    low, high = codes[0] * v[0][:, None, :], codes[1] * v[1][:, None, :]
    for j in tl.static_range(2, 8, 2):
        low += codes[j] * v[j][:, None, :]
        high += codes[j + 1] * v[j + 1][:, None, :]
    if GROUPS == 1:
        return (tl.sum(low + high, axis=2),)
    else:
        return tl.sum(low, axis=2), tl.sum(high, axis=2)


@triton.jit
def _sum_of_products(v, w):
    """[H]"""
    total = v[0] * w[0]
    for j in tl.static_range(1, 8):
        total += v[j] * w[j]
    return tl.sum(total, axis=1)


@triton.jit
def _sums_of(v, GROUPS: tl.constexpr):
    """[H] for each group of slabs."""
    low, high = v[0] + v[2] + v[4] + v[6], v[1] + v[3] + v[5] + v[7]
    if GROUPS == 1:
        return (tl.sum(low + high, axis=1),)
    else:
        return tl.sum(low, axis=1), tl.sum(high, axis=1)


@triton.jit
def _products(v, w):
    products = no_tiles()
    for j in tl.static_range(8):
        products += (v[j] * w[j],)
    return products
