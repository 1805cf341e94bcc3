"""Paged attention over block-relative keys, on the CPU. The mathematics is that of `kernels/reference.py`."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from stellarbyte.kernels.cpu.instructions import add_scaled, dot, exp

# T tokens, N sequences, M blocks of the longest table, B blocks of the cache, S block size
# H query heads, K key/value heads, G = H/K, D head dim, O offsets

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


class BatchArrays(NamedTuple):
    """The arrays of a `ForwardBatch`, and which sequence each token belongs to."""

    positions_T: Integers
    slots_T: Integers
    offsets_T: Integers
    sequences_T: Integers
    block_tables_NM: Integers
    block_bases_NM: Integers
    num_blocks_N: Integers
    num_sink_blocks_N: Integers


class Rotations(NamedTuple):
    """cos and sin of offset · θ_j and the XPos factor ζ_j^(offset/b), each [O, D/2]; the factor is 1 without XPos."""

    cos_OD: Floats
    sin_OD: Floats
    decay_OD: Floats


@njit(inline="always")
def _rotate(source, offset, sign, rotations, out):
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


@njit(parallel=True, fastmath=True, nogil=True, cache=True)
def write_kv(qkv, shape, q_norm, k_norm, eps, batch, rotations, keys, values, num_threads):
    """Store a step's keys, rotated by their offset in their block, and values; normalise q and k where asked.

    Args:
        qkv: [T, (H + 2K) · D]; its queries are normalised in place.
        shape: (H, K, D).
        q_norm, k_norm: [D], or empty for none.
        keys, values: [B, S, K, D] of one layer.
    """
    num_heads, num_kv_heads, dim = shape
    block_size = keys.shape[1]
    for thread in prange(num_threads):
        for t in range(thread, len(qkv), num_threads):
            heads = qkv[t].reshape((num_heads + 2 * num_kv_heads, dim))
            block, place = batch.slots_T[t] // block_size, batch.slots_T[t] % block_size
            if len(q_norm):
                for h in range(num_heads):
                    _norm_head(heads[h], q_norm, eps)
            for h in range(num_kv_heads):
                key = heads[num_heads + h]
                if len(k_norm):
                    _norm_head(key, k_norm, eps)
                _rotate(key, batch.offsets_T[t], -1, rotations, keys[block, place, h])
                values[block, place, h] = heads[num_heads + num_kv_heads + h]


@njit(parallel=True, fastmath=True, nogil=True, cache=True)
def paged_attention(qkv, shape, batch, rotations, keys, values, window, sinks, scale, out, num_threads):
    """out [T, H · D] = attention of every token over the live blocks of its sequence.

    Args:
        window: tokens a query looks back, 0 for all; `sinks`: first tokens seen besides.
        scale: of scores, before the softmax.
    """
    num_heads, num_kv_heads, dim = shape
    group = num_heads // num_kv_heads
    # Heads that share keys are worked on together, unless that would leave a thread without work.
    together = group if len(qkv) * num_kv_heads >= 4 * num_threads else 1
    parts = num_heads // together
    block_size = keys.shape[1]
    for thread in prange(num_threads):
        scores = np.empty((together, batch.block_tables_NM.shape[1] * block_size), np.float32)
        rotated = np.empty((together, dim), np.float32)
        totals = np.empty((together, dim), np.float32)
        for item in range(thread, len(qkv) * parts, num_threads):  # strided: later tokens of a prompt see more keys
            t, head = item // parts, item % parts * together
            kv_head = head // group
            position = batch.positions_T[t]
            n = batch.sequences_T[t]
            num_sinks = batch.num_sink_blocks_N[n]
            first_seen = position - window + 1 if window else 0
            best = np.full(together, -np.inf, np.float32)
            for b in range(batch.num_blocks_N[n]):
                base = batch.block_bases_NM[n, b]
                start, stop = _visible_part(base, b < num_sinks, position, first_seen, sinks, block_size)
                if start >= stop:
                    continue
                meeting = position
                if b < num_sinks and window:
                    meeting = min(position, window + sinks - 1)
                _rotate_heads(qkv[t], head, together, dim, meeting - base, rotations, rotated)
                block_start = batch.block_tables_NM[n, b] * block_size
                for place in range(start, stop):
                    key_start = ((block_start + place) * num_kv_heads + kv_head) * dim
                    for g in range(together):
                        score = dot(rotated, g * dim, keys, key_start, dim) * scale
                        scores[g, b * block_size + place] = score
                        best[g] = max(best[g], score)
            _weigh_values(scores, best, batch, n, position, first_seen, sinks, values, kv_head, totals)
            for g in range(together):
                for d in range(dim):
                    out[t, (head + g) * dim + d] = totals[g, d]


@njit(inline="always")
def _visible_part(base, is_sink, position, first_seen, sinks, block_size):
    """The places start..stop of a block that a query sees."""
    stop = min(block_size, position - base + 1)
    if is_sink:
        return 0, min(stop, sinks - base)
    return max(0, first_seen - base), stop


@njit(inline="always")
def _rotate_heads(row, head, together, dim, offset, rotations, rotated):
    """Rotate the query heads head..head+together to meet a block; a query before its base (XPos) does not occur."""
    for g in range(together):
        at = (head + g) * dim
        _rotate(row[at : at + dim], offset, 1, rotations, rotated[g])


@njit(inline="always")
def _weigh_values(scores, best, batch, n, position, first_seen, sinks, values, kv_head, totals):
    """totals[g] = Σ softmax(scores[g]) · values"""
    _, block_size, num_kv_heads, dim = values.shape
    together = len(best)
    weight_sums = np.zeros(together, np.float32)
    totals[:] = 0
    for b in range(batch.num_blocks_N[n]):
        base = batch.block_bases_NM[n, b]
        is_sink = b < batch.num_sink_blocks_N[n]
        start, stop = _visible_part(base, is_sink, position, first_seen, sinks, block_size)
        block_start = batch.block_tables_NM[n, b] * block_size
        for g in range(together):
            for place in range(start, stop):
                weight = exp(scores[g, b * block_size + place] - best[g])
                scores[g, b * block_size + place] = weight
                weight_sums[g] += weight
        for place in range(start, stop):
            value_start = ((block_start + place) * num_kv_heads + kv_head) * dim
            for g in range(together):
                add_scaled(totals, g * dim, scores[g, b * block_size + place], values, value_start, dim)
    for g in range(together):
        for d in range(dim):
            totals[g, d] /= weight_sums[g]
