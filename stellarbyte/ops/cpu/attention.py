"""Paged attention over block-relative keys, on the CPU. The mathematics is that of `ops/reference.py`."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from stellarbyte.ops.cpu import FAST_MATH, KEEP_COMPILED
from stellarbyte.ops.cpu.instructions import add_weighted_rows, exp, four_dots, prefetch

# T tokens, N sequences, M blocks of the longest table, B blocks of the cache, S block size
# H query heads, K key/value heads, G = H/K, D head dim, O offsets

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


class BatchArrays(NamedTuple):
    """The arrays of a `ForwardBatch`, each token's sequence, and each sequence's tokens."""

    positions_T: Integers
    slots_T: Integers
    offsets_T: Integers
    sequences_T: Integers
    starts_N: Integers  # [N + 1] its first token, and T
    block_tables_NM: Integers
    block_bases_NM: Integers
    num_blocks_N: Integers
    num_sink_blocks_N: Integers


class Rotations(NamedTuple):
    """cos and sin of offset · θ_j and the XPos factor ζ_j^(offset/b), each [O, D/2]; the factor is 1 without XPos.

    The gain is a factor of the pairs of queries, [D/2]; empty: 1. Those of all layers have a leading dimension, one for
    each rotation of `layers.LayerWeights.rotations_L`.
    """

    cos_OD: Floats
    sin_OD: Floats
    decay_OD: Floats
    query_gain_D: Floats


@njit(inline="always")
def rotate(source, offset, sign, rotations, out):
    """out = source · e^{i·offset·θ} · ζ^(sign·offset/b) for offset ≥ 0: sign 1 for queries, -1 for keys."""
    half = len(source) // 2
    for j in range(half):
        decay = rotations.decay_OD[offset, j]
        factor = decay if sign > 0 else np.float32(1.0) / decay
        cos = rotations.cos_OD[offset, j] * factor
        sin = rotations.sin_OD[offset, j] * factor
        first, second = source[j], source[j + half]
        out[j] = first * cos - second * sin
        out[j + half] = second * cos + first * sin


@njit(inline="always")
def _norm_head(head, weight, eps):
    total = np.float32(0.0)
    for d in range(len(head)):
        total += head[d] * head[d]
    factor = np.float32(1.0) / np.sqrt(total / np.float32(len(head)) + eps)
    for d in range(len(head)):
        head[d] *= factor * weight[d]


@njit(inline="always")
def _amplify(head, gain):
    for j in range(len(gain)):
        head[j] *= gain[j]
        head[j + len(gain)] *= gain[j]


@njit(parallel=True, fastmath=FAST_MATH, nogil=True, cache=KEEP_COMPILED)
def write_kv(qkv, shape, q_norm, k_norm, eps, batch, rotations, keys, values, num_threads):
    """Store a step's keys, rotated by their offset in their block, and values; normalise q and k if weights are given,
    and multiply q with its gain.

    Args:
        qkv: [T, at least (H + 2K) · D]; its queries are normalised and multiplied in place.
        shape: (H, K, D).
        q_norm, k_norm: [D], [H · D] and [K · D] for one norm over all heads, or empty.
        keys, values: [B, S, K, D] of one layer.
    """
    num_heads, num_kv_heads, dim = shape
    block_size = keys.shape[1]
    for thread in prange(num_threads):
        for t in range(thread, len(qkv), num_threads):
            row = qkv[t, : (num_heads + 2 * num_kv_heads) * dim]
            heads = row.reshape((num_heads + 2 * num_kv_heads, dim))
            block, place = batch.slots_T[t] // block_size, batch.slots_T[t] % block_size
            if len(q_norm):
                for first in range(0, num_heads * dim, len(q_norm)):
                    _norm_head(row[first : first + len(q_norm)], q_norm, eps)
            if len(rotations.query_gain_D):
                for h in range(num_heads):
                    _amplify(heads[h], rotations.query_gain_D)
            if len(k_norm):
                for first in range(num_heads * dim, (num_heads + num_kv_heads) * dim, len(k_norm)):
                    _norm_head(row[first : first + len(k_norm)], k_norm, eps)
            for h in range(num_kv_heads):
                key = heads[num_heads + h]
                rotate(key, batch.offsets_T[t], -1, rotations, keys[block, place, h])
                values[block, place, h] = heads[num_heads + num_kv_heads + h]


@njit(parallel=True, fastmath=FAST_MATH, nogil=True, cache=KEEP_COMPILED)
def paged_attention(
    qkv, shape, batch, rotations, keys, values, window, sinks, scale, softcap, softmax_sink, most, out, num_threads
):
    """out [T, H · D] = attention of every token over the live blocks of its sequence.

    Args:
        window: tokens a query looks back, 0 for all; `sinks`: first tokens, always seen.
        scale: of scores, before the softmax.
        softcap: c of c · tanh(score / c), before the softmax; 0: none.
        softmax_sink: [H] one more logit of each head in the softmax, without a value; empty: none.
        most: sequences with more tokens are left out.
    """
    num_heads, num_kv_heads, dim = shape
    group = num_heads // num_kv_heads
    # A thread computes all heads of a token, block by block in memory order; with few tokens, some of the heads.
    together = num_heads
    if len(qkv) < 2 * num_threads:
        together = group if len(qkv) * num_kv_heads >= 4 * num_threads else 1
    parts = num_heads // together
    block_size = keys.shape[1]
    stride = num_kv_heads * dim  # from a position's key to the next one's
    # Each head prefetches a part of the next block; with few heads memory is not the limit.
    share = block_size * stride // num_heads if together == num_heads else 0
    for thread in prange(num_threads):
        scores = np.empty((together, batch.block_tables_NM.shape[1] * block_size + 3), np.float32)
        rotated = np.empty(dim, np.float32)
        weight_sums = np.empty(together, np.float32)
        totals = np.empty((together, dim), np.float32)
        for item in range(thread, len(qkv) * parts, num_threads):  # strided: later tokens of a prompt see more keys
            t, first_head = item // parts, item % parts * together
            position = batch.positions_T[t]
            n = batch.sequences_T[t]
            if batch.starts_N[n + 1] - batch.starts_N[n] > most:
                continue
            num_sinks = batch.num_sink_blocks_N[n]
            first_seen = position - window + 1 if window else 0
            count = 0  # keys that the query sees; their scores are contiguous
            for b in range(batch.num_blocks_N[n]):
                base = batch.block_bases_NM[n, b]
                start, stop = visible_part(base, b < num_sinks, position, first_seen, sinks, block_size)
                if start >= stop:
                    continue
                meeting = position
                if b < num_sinks and window:
                    meeting = min(position, window + sinks - 1)
                first_key = (batch.block_tables_NM[n, b] * block_size + start) * stride
                after = batch.block_tables_NM[n, min(b + 1, batch.num_blocks_N[n] - 1)] * block_size * stride
                for g in range(together):
                    prefetch(keys, after + g * share, share)
                    head = first_head + g
                    rotate(qkv[t, head * dim : (head + 1) * dim], meeting - base, 1, rotations, rotated)
                    key = first_key + head // group * dim
                    _scores(rotated, dim, keys, key, stride, scores, g * scores.shape[1] + count, stop - start)
                count += stop - start
            for g in range(together):
                sink = softmax_sink[first_head + g : first_head + g + 1]
                weight_sums[g] = exponentials(scores[g, :count], scale, softcap, sink)
            totals[:] = 0
            seen = 0
            for b in range(batch.num_blocks_N[n]):
                base = batch.block_bases_NM[n, b]
                start, stop = visible_part(base, b < num_sinks, position, first_seen, sinks, block_size)
                if start >= stop:
                    continue
                first_value = (batch.block_tables_NM[n, b] * block_size + start) * stride
                after = batch.block_tables_NM[n, min(b + 1, batch.num_blocks_N[n] - 1)] * block_size * stride
                for g in range(together):
                    prefetch(values, after + g * share, share)
                    value = first_value + (first_head + g) // group * dim
                    weights = g * scores.shape[1] + seen
                    add_weighted_rows(totals, g * dim, scores, weights, values, value, stride, stop - start, dim)
                seen += stop - start
            for g in range(together):
                for d in range(dim):
                    out[t, (first_head + g) * dim + d] = totals[g, d] / weight_sums[g]


@njit(inline="always")
def visible_part(base, is_sink, position, first_seen, sinks, block_size):
    """start..stop of the offsets in a block that a query sees."""
    stop = min(block_size, position - base + 1)
    if is_sink:
        return 0, min(stop, sinks - base)
    return max(0, first_seen - base), stop


@njit(inline="always")
def _scores(rotated, dim, keys, key, stride, scores, at, count):
    """scores[at + i] = rotated · key i of `count` neighbours; up to three numbers after them are overwritten."""
    whole = count // 4 * 4
    for i in range(0, whole, 4):
        four_dots(scores, at + i, rotated, 0, keys, key + i * stride, stride, dim)
    for i in range(whole, count):  # a stride of 0 repeats the key
        four_dots(scores, at + i, rotated, 0, keys, key + i * stride, 0, dim)


@njit(inline="always")
def _cap(scores, scale, softcap):
    """scores = softcap · tanh(scale · score / softcap)"""
    for i in range(len(scores)):
        x = scores[i] * scale / softcap
        shrunk = exp(np.float32(-2.0) * abs(x))
        size = softcap * (np.float32(1.0) - shrunk) / (np.float32(1.0) + shrunk)
        scores[i] = size if x > 0 else -size


@njit(inline="always")
def exponentials(scores, scale, softcap, sink):
    """scores = e^(scale · score - the largest), of capped scores if there is a cap; returns their sum.

    With a sink of the softmax, `sink` [1] or empty, the largest may be its logit, and the sum includes its term.
    """
    if softcap > 0:
        _cap(scores, scale, softcap)
        scale = np.float32(1.0)
    best = scores[0]
    for i in range(len(scores)):
        best = max(best, scores[i])
    total = np.float32(0.0)
    if len(sink):
        best = max(best, sink[0] / scale)
        total = exp(sink[0] - best * scale)
    for i in range(len(scores)):
        weight = exp((scores[i] - best) * scale)
        scores[i] = weight
        total += weight
    return total
