"""The product of one row with an int4 matrix: every weight is used once, without the matrix units.

A thread reads 16 bytes, the codes of 32 inputs of an output. Its 32 inputs stay in registers for the same slab of
several outputs, and scale and zero point are applied to the sum over a slab: Σ s (c - z) x = s (Σ c x - z Σ x).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from stellarbyte.ops.triton.gates import NO_GATE
from stellarbyte.ops.triton.grouped.unpack import unpack_words
from stellarbyte.ops.triton.grouped.weights import SLAB, SYMMETRIC_ZERO, GroupedWeight
from stellarbyte.ops.triton.linear import finish
from stellarbyte.ops.triton.overlap import let_next_begin, no_tiles, overlapping, wait_for_inputs

# N outputs, K inputs, H slabs of 32 inputs

_SYMMETRIC = tl.constexpr(16.0 + SYMMETRIC_ZERO)


class VectorTile(NamedTuple):
    """Of a program: outputs that it reads side by side, how often, slabs at once, and warps."""

    block_n: int
    repeats: int  # with a gate as many gates and as many ups
    slabs: int
    num_warps: int


def vector_tile(num_inputs: int, has_gate: bool) -> VectorTile:
    """Long reads of few outputs: registers limit the programs of a multiprocessor, and so the reads on their way."""
    slabs = min(64, triton.next_power_of_2(num_inputs // SLAB))
    return VectorTile(*((4, 2) if has_gate else (8, 1)), slabs, max(1, min(4, slabs // 8)))


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
    num_slabs = num_inputs // SLAB
    _vector_kernel[(triton.cdiv(num_outputs, tile.block_n * tile.repeats),)](
        x_1K,
        weight.codes.view(torch.int32),
        weight.scales_GN,
        x_1K if weight.zeros_GN is None else weight.zeros_GN,
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
        EVEN=num_slabs % tile.slabs == 0 and num_outputs % (tile.block_n * tile.repeats) == 0,
        GROUP_SLABS=weight.group_size // SLAB,
        HAS_ZEROS=weight.zeros_GN is not None,
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
    x, codes, scales, zeros, bias, norm, residual, branch_scale, out, num_outputs, num_inputs, eps,
    BLOCK_N: tl.constexpr, REPEATS: tl.constexpr, SLABS: tl.constexpr, NUM_TILES: tl.constexpr, EVEN: tl.constexpr,
    GROUP_SLABS: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_BRANCH_SCALE: tl.constexpr, GATE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Some outputs; the next slabs' numbers are loaded ahead, the first ones while the row is still being computed."""
    let_next_begin(OVERLAPS)
    READS: tl.constexpr = 2 * REPEATS if GATE else REPEATS  # with a gate, the ups after the gates
    width = num_outputs * 2 if GATE else num_outputs
    first = tl.program_id(0) * (BLOCK_N * REPEATS) + tl.arange(0, BLOCK_N)
    h = tl.arange(0, SLABS)
    loaded, scales_ahead, zeros_ahead = no_tiles(), no_tiles(), no_tiles()
    for r in tl.static_range(READS):
        loaded += (_load_words(codes, first, r, h, num_outputs, width, num_inputs, BLOCK_N, REPEATS, EVEN),)
        scale, zero = _load_scales(
            scales, zeros, first, r, h, num_outputs, width, num_inputs, BLOCK_N, REPEATS, GROUP_SLABS, HAS_ZEROS
        )
        scales_ahead += (scale,)
        zeros_ahead += (zero,)
    wait_for_inputs(OVERLAPS)
    totals = no_tiles()
    for _ in tl.static_range(READS):
        totals += (tl.zeros([SLABS, BLOCK_N], tl.float32),)
    squares = tl.zeros([SLABS], tl.float32)
    for i in tl.static_range(NUM_TILES):
        here = i * SLABS + h
        inside_h = here < num_inputs // 32
        v = _load_row(x, here, inside_h)
        if HAS_NORM:
            squares += _sum_of_products(v, v)
            v = _products(v, _load_row(norm, here, inside_h))
        sums = _sum_of(v)
        now, scales_now, zeros_now = loaded, scales_ahead, zeros_ahead
        loaded, scales_ahead, zeros_ahead = no_tiles(), no_tiles(), no_tiles()
        if i + 1 < NUM_TILES:
            for r in tl.static_range(READS):
                loaded += (
                    _load_words(codes, first, r, here + SLABS, num_outputs, width, num_inputs, BLOCK_N, REPEATS, EVEN),
                )
                scale, zero = _load_scales(
                    scales, zeros, first, r, here + SLABS, num_outputs, width, num_inputs, BLOCK_N, REPEATS,
                    GROUP_SLABS, HAS_ZEROS,
                )  # fmt: skip
                scales_ahead += (scale,)
                zeros_ahead += (zero,)
        before, totals = totals, no_tiles()
        for r in tl.static_range(READS):
            zero = _SYMMETRIC
            if HAS_ZEROS:
                zero = 16.0 + zeros_now[r].to(tl.float32)
            total = _sum_of_codes(now[r], v) - zero * sums[:, None]
            totals += (before[r] + scales_now[r].to(tl.float32) * total,)
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
            total, ups, addend, out, scales, bias, branch_scale, n, n, num_outputs, inside,
            False, HAS_BIAS, HAS_RESIDUAL, HAS_BRANCH_SCALE, GATE,
        )  # fmt: skip


@triton.jit
def _load_words(
    codes, first, r: tl.constexpr, h, num_outputs, width, num_inputs, BLOCK_N: tl.constexpr, REPEATS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """int32 [H, N, 4]."""
    n = first + (r % REPEATS) * BLOCK_N
    row = h.to(tl.int64)[:, None] * width + ((r // REPEATS) * num_outputs + n)[None, :]
    place = codes + row[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    if EVEN:
        return tl.load(place, eviction_policy="evict_first")
    inside = (n < num_outputs)[None, :] & (h < num_inputs // 32)[:, None]
    return tl.load(place, mask=inside[:, :, None], other=0, eviction_policy="evict_first")


@triton.jit
def _load_scales(
    scales, zeros, first, r: tl.constexpr, h, num_outputs, width, num_inputs, BLOCK_N: tl.constexpr,
    REPEATS: tl.constexpr, GROUP_SLABS: tl.constexpr, HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    """[H, N] of scales, and of zero points if there are; else scales again."""
    n = first + (r % REPEATS) * BLOCK_N
    inside = (n < num_outputs)[None, :] & (h < num_inputs // 32)[:, None]
    place = (h // GROUP_SLABS).to(tl.int64)[:, None] * width + (r // REPEATS) * num_outputs + n[None, :]
    scale = tl.load(scales + place, mask=inside, other=0.0)
    zero = scale
    if HAS_ZEROS:
        zero = tl.load(zeros + place, mask=inside, other=0)
    return scale, zero


@triton.jit
def _load_row(x, h, inside_h):
    """float32 [H, 4] × 8, as the codes of `unpack_words`: of byte b of word w in a half of a slab, input 4 w + b."""
    word = tl.arange(0, 4)[None, :]
    mask = inside_h[:, None] & (word < 4)
    if x.dtype.element_ty == tl.bfloat16:  # four numbers in one read
        fours = x.to(tl.pointer_type(tl.int64)) + h[:, None] * 8 + word
        return _numbers(tl.load(fours, mask=mask, other=0)) + _numbers(tl.load(fours + 4, mask=mask, other=0))
    else:
        loaded = no_tiles()
        for j in tl.static_range(8):
            place = x + h[:, None] * 32 + (j // 4) * 16 + 4 * word + j % 4
            loaded += (tl.load(place, mask=mask, other=0.0).to(tl.float32),)
        return loaded


@triton.jit
def _numbers(four):
    """The bfloat16 numbers of an int64, in float32."""
    low, high = four.to(tl.int32), (four >> 32).to(tl.int32)
    return (
        (low << 16).to(tl.float32, bitcast=True), (low & -65536).to(tl.float32, bitcast=True),
        (high << 16).to(tl.float32, bitcast=True), (high & -65536).to(tl.float32, bitcast=True),
    )  # fmt: skip


@triton.jit
def _sum_of_codes(words, v):
    """[H, N]: the sums over slabs of (16 + code) · v."""
    total = tl.zeros(words.shape, tl.float32)
    codes = unpack_words(words)
    for j in tl.static_range(8):
        total += codes[j] * v[j][:, None, :]
    return tl.sum(total, axis=2)


@triton.jit
def _sum_of_products(v, w):
    """[H]"""
    total = v[0] * w[0]
    for j in tl.static_range(1, 8):
        total += v[j] * w[j]
    return tl.sum(total, axis=1)


@triton.jit
def _sum_of(v):
    """[H]"""
    total = v[0]
    for j in tl.static_range(1, 8):
        total += v[j]
    return tl.sum(total, axis=1)


@triton.jit
def _products(v, w):
    products = no_tiles()
    for j in tl.static_range(8):
        products += (v[j] * w[j],)
    return products
