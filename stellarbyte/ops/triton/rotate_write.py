"""Norms and rotates heads; writes a step's keys and values to the paged cache.

Heads are held as two halves of D/2 each, since rotations turn the pairs (j, j + D/2).
"""

import torch
import triton
import triton.language as tl

from stellarbyte.ops.triton.lora import Addend
from stellarbyte.ops.triton.overlap import overlapping, wait_for_inputs
from stellarbyte.ops.triton.paged import HeadShape, PagedRows, Rotations, locate, ring_length

# T tokens, N = (H + 2K) · D packed row, H query heads, K kv heads, D head dim, P pairs (D/2, padded)
# B blocks, S block size; in kernels X is any number of heads or of tokens


def write_kv(
    qkv_TN: torch.Tensor,
    keys_BSKD: torch.Tensor,
    values_BSKD: torch.Tensor,
    rows: PagedRows,
    rotations: Rotations,
    heads: HeadShape,
    *,
    sink_tokens: int,
    k_norm_D: torch.Tensor | None,
    norm_eps: float,
) -> None:
    """Store the keys of a step, normed and rotated by their offset in their block, and its values.

    Args:
        qkv_TN: packed rows q | k | v, contiguous, float32 or bfloat16, as the norm's weight.
        keys_BSKD, values_BSKD: of one layer, contiguous, in that dtype or in fp8 (e4m3).
        k_norm_D: weight of the RMSNorm of each key head, with `norm_eps`; None: no norm.
    """
    tables_NE, block_size = rows.tables_NE, keys_BSKD.shape[1]
    num_heads, num_kv_heads, head_dim = heads
    _write_kernel[(len(qkv_TN),)](
        qkv_TN, keys_BSKD, values_BSKD, rows.positions_T, rows.sequences_T, tables_NE, tables_NE.stride(0),
        ring_length(rows, block_size, sink_tokens), *rotations[:3], k_norm_D, norm_eps,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, SINKS=sink_tokens,
        KV_HEADS=triton.next_power_of_2(num_kv_heads), PAIRS=triton.next_power_of_2(head_dim // 2),
    )  # fmt: skip


def norm_projections(
    qkv_TN: torch.Tensor, norm_N: torch.Tensor, heads: HeadShape, eps: float, addend: Addend | None = None
) -> None:
    """Add the addend to packed rows q | k | v, then norm them, in place: an RMSNorm over all of q, and one over k.

    `norm_N`: the weights of both, one after the other.
    """
    num_heads, num_kv_heads, head_dim = heads
    _norm_projections_kernel[(len(qkv_TN), 2 if addend is None else 3)](
        qkv_TN, *((None, None) if addend is None else addend), norm_N, eps, num_heads * head_dim,
        num_kv_heads * head_dim, BLOCK=triton.next_power_of_2(num_heads * head_dim), **overlapping(qkv_TN.device),
    )  # fmt: skip


@triton.jit
def _norm_projections_kernel(
    qkv, delta, delta_scales, norm, eps, q_width, k_width, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr
):
    """q, k or v of one row."""
    wait_for_inputs(OVERLAPS)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    width = tl.where(part == 0, q_width, k_width)
    first = tl.where(part == 0, 0, q_width + (part - 1) * k_width)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row * (q_width + 2 * k_width) + first + column
    numbers = tl.load(qkv + place, mask=inside, other=0.0).to(tl.float32)
    if delta is not None:
        if tl.load(delta_scales + row) != 0:
            numbers += tl.load(delta + place, mask=inside, other=0.0).to(tl.float32)
    if part < 2:
        factor = tl.rsqrt(tl.sum(numbers * numbers, axis=0) / width + eps)
        numbers *= factor * tl.load(norm + first + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(qkv + place, numbers.to(qkv.dtype.element_ty), mask=inside)


@triton.jit
def load_heads(source, inside_X, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr):
    """Both halves of the heads that begin at the pointers `source` [X, 1], float32 [X, P]; zeros where not `inside`."""
    pair_P = tl.arange(0, PAIRS)[None, :]
    inside = inside_X[:, None] & (pair_P < HEAD_DIM // 2)
    first_XP = tl.load(source + pair_P, mask=inside, other=0.0)
    second_XP = tl.load(source + HEAD_DIM // 2 + pair_P, mask=inside, other=0.0)
    return first_XP.to(tl.float32), second_XP.to(tl.float32)


@triton.jit
def add_heads(first_XP, second_XP, delta, delta_scales, row, first_number_X1, inside_X, HEAD_DIM: tl.constexpr,
              PAIRS: tl.constexpr):  # fmt: skip
    """The heads plus the addend of their packed row, in which they begin at `first_number`."""
    if tl.load(delta_scales + row) != 0:
        first_delta_XP, second_delta_XP = load_heads(delta + first_number_X1, inside_X, HEAD_DIM, PAIRS)
        first_XP += first_delta_XP
        second_XP += second_delta_XP
    return first_XP, second_XP


@triton.jit
def norm_heads(first_XP, second_XP, norm, eps, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr):
    """RMSNorm of each head over its HEAD_DIM numbers; rounded to the dtype of `norm` as in `ByteRMSNorm`."""
    pair_P = tl.arange(0, PAIRS)
    inside_P = pair_P < HEAD_DIM // 2
    factor_X = tl.rsqrt(tl.sum(first_XP * first_XP + second_XP * second_XP, axis=1) / HEAD_DIM + eps)[:, None]
    dtype = norm.dtype.element_ty
    first_weight_P = tl.load(norm + pair_P, mask=inside_P, other=0.0).to(tl.float32)[None, :]
    second_weight_P = tl.load(norm + HEAD_DIM // 2 + pair_P, mask=inside_P, other=0.0).to(tl.float32)[None, :]
    first_XP = (first_XP * factor_X).to(dtype).to(tl.float32) * first_weight_P
    second_XP = (second_XP * factor_X).to(dtype).to(tl.float32) * second_weight_P
    return first_XP.to(dtype).to(tl.float32), second_XP.to(dtype).to(tl.float32)


@triton.jit
def amplify(first_XP, second_XP, gain, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr):
    """The heads with each pair multiplied by its gain."""
    pair_P = tl.arange(0, PAIRS)
    gain_1P = tl.load(gain + pair_P, mask=pair_P < HEAD_DIM // 2, other=0.0)[None, :]
    return first_XP * gain_1P, second_XP * gain_1P


@triton.jit
def rotation(
    distance_X, inside_X, cos, sin, log_decay, SIGN: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr
):
    """cos and sin of distance · θ, both times ζ^(SIGN · distance / b): SIGN 1 for queries, -1 for keys. [X, P] float32.

    Distances may be negative; those not `inside` are not looked up.
    """
    pair_P = tl.arange(0, PAIRS)[None, :]
    inside = inside_X[:, None] & (pair_P < HEAD_DIM // 2)
    at = tl.abs(distance_X)[:, None].to(tl.int64) * (HEAD_DIM // 2) + pair_P
    cos_XP = tl.load(cos + at, mask=inside, other=0.0)
    sin_XP = tl.load(sin + at, mask=inside, other=0.0)
    sin_XP = tl.where((distance_X < 0)[:, None], -sin_XP, sin_XP)
    if log_decay is not None:
        exponent_P = tl.load(log_decay + pair_P, mask=pair_P < HEAD_DIM // 2, other=0.0) * SIGN
        decay_XP = tl.exp(tl.where(inside_X, distance_X, 0).to(tl.float32)[:, None] * exponent_P)
        cos_XP *= decay_XP
        sin_XP *= decay_XP
    return cos_XP, sin_XP


@triton.jit
def rotate(first_XP, second_XP, cos_XP, sin_XP):
    return first_XP * cos_XP - second_XP * sin_XP, second_XP * cos_XP + first_XP * sin_XP


@triton.jit
def _narrow(x, cache):
    """Convert to the cache's dtype. fp8 has no infinity: numbers beyond its range become its largest."""
    if cache.dtype.element_ty == tl.float8e4nv:
        x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(cache.dtype.element_ty)


@triton.jit
def store_newest(
    qkv, delta, delta_scales, row, kv_head_X, inside_X, position, keys, values, table, ring, cos, sin, log_decay,
    k_norm, norm_eps, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SINKS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Write the keys and values of some kv heads of the packed row `row` (int64) to the cache.

    `delta` None: no addend.
    """
    block, offset = locate(position, table, ring, SINKS, BLOCK_SIZE)
    key_X1 = row * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM) + (NUM_HEADS + kv_head_X)[:, None] * HEAD_DIM
    first_XP, second_XP = load_heads(qkv + key_X1, inside_X, HEAD_DIM, PAIRS)
    if delta is not None:
        first_XP, second_XP = add_heads(
            first_XP, second_XP, delta, delta_scales, row, key_X1, inside_X, HEAD_DIM, PAIRS
        )
    if k_norm is not None:
        first_XP, second_XP = norm_heads(first_XP, second_XP, k_norm, norm_eps, HEAD_DIM, PAIRS)
    distance_1 = offset + tl.arange(0, 1)
    cos_1P, sin_1P = rotation(distance_1, distance_1 >= 0, cos, sin, log_decay, -1, HEAD_DIM, PAIRS)
    first_XP, second_XP = rotate(first_XP, second_XP, cos_1P, sin_1P)

    pair_P = tl.arange(0, PAIRS)[None, :]
    inside = inside_X[:, None] & (pair_P < HEAD_DIM // 2)
    place = (block * BLOCK_SIZE + offset) * (NUM_KV_HEADS * HEAD_DIM) + kv_head_X[:, None] * HEAD_DIM + pair_P
    tl.store(keys + place, _narrow(first_XP, keys), mask=inside)
    tl.store(keys + place + HEAD_DIM // 2, _narrow(second_XP, keys), mask=inside)
    value_X1 = key_X1 + NUM_KV_HEADS * HEAD_DIM
    first_XP, second_XP = load_heads(qkv + value_X1, inside_X, HEAD_DIM, PAIRS)
    if delta is not None:
        first_XP, second_XP = add_heads(
            first_XP, second_XP, delta, delta_scales, row, value_X1, inside_X, HEAD_DIM, PAIRS
        )
    tl.store(values + place, _narrow(first_XP, keys), mask=inside)
    tl.store(values + place + HEAD_DIM // 2, _narrow(second_XP, keys), mask=inside)


@triton.jit
def _write_kernel(
    qkv, keys, values, positions, sequences, tables, table_stride, ring, cos, sin, log_decay, k_norm, norm_eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SINKS: tl.constexpr, KV_HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """All kv heads of one token."""
    row = tl.program_id(0).to(tl.int64)
    table = tables + tl.load(sequences + row).to(tl.int64) * table_stride
    kv_head_X = tl.arange(0, KV_HEADS)
    store_newest(
        qkv, None, None, row, kv_head_X, kv_head_X < NUM_KV_HEADS, tl.load(positions + row), keys, values, table, ring,
        cos, sin, log_decay, k_norm, norm_eps, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, SINKS, PAIRS,
    )  # fmt: skip
