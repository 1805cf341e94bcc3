"""Attention of many queries of a sequence at a time; the mathematics is that of `attention.paged_attention`.

Keys and values of a sequence become panels once for a step (`query_tiles`), for the matrix unit or in float32. Its keys
are first turned from the base of their block to one that all have in common, that of the block with the step's first
token: no distance is longer than those of the step's queries. So 16 queries of a head at a time are rotated once, and
then have their products with many keys. Sinks keep the base of their block, as a window caps the positions of queries
for them.
"""

import numpy as np
from numba import njit, prange

from stellarbyte.ops.cpu import FAST_MATH, KEEP_COMPILED
from stellarbyte.ops.cpu.attention import visible_part
from stellarbyte.ops.cpu.instructions import exp, exponentiate, largest
from stellarbyte.ops.cpu.panels.tiles import COLUMNS_OF_A_TILE, ROWS_OF_A_TILE
from stellarbyte.ops.cpu.query_tiles import (
    add_values,
    begin_products,
    empty_queries,
    end_products,
    key_products,
    make_panels,
    rotate_query,
)

# T tokens, H query heads, K key/value heads, D head dim, B blocks of the cache, S block size, L places in live blocks

MIN_QUERIES = 16  # of a sequence in a step: fewer do not make up for panels of its keys and values
MIN_WINDOW = 512  # below, a query sees few of the keys in panels
_LEAST_DECAY = np.float32(1e-12)  # XPos: 1 / decay of the step's own keys, which float32 must hold with room
_UNSEEN = np.float32(-1e30)  # a score whose exponential is nothing


@njit(inline="always")
def can_tile(block_size, dim, window, softcap):
    """Whether blocks and heads consist of whole tiles, and queries see enough keys; scores must not have a cap."""
    is_wide = window == 0 or window >= MIN_WINDOW
    return block_size % ROWS_OF_A_TILE == 0 and dim % COLUMNS_OF_A_TILE == 0 and is_wide and softcap == 0


@njit(fastmath=FAST_MATH, nogil=True, cache=KEEP_COMPILED)
def tiled_attention(
    form, qkv, shape, batch, rotations, keys, values, window, sinks, scale, softmax_sink, out, num_threads
):
    """As `paged_attention` without a cap, for sequences with at least `MIN_QUERIES` tokens, where `can_tile`.

    `form`: `query_tiles.SPLIT` or FLOATS. Returns whether it has done so: not if a value is not finite, which would
    reach tokens that do not see it, or if XPos takes the step's own keys out of the range of float32.
    """
    for n in range(len(batch.num_blocks_N)):
        first, end = batch.starts_N[n], batch.starts_N[n + 1]
        if end - first >= MIN_QUERIES:
            last, common = batch.positions_T[end - 1], _common_base(batch, n, batch.positions_T[first])
            if rotations.decay_OD[max(0, last - common)].min() < _LEAST_DECAY:
                return False
            turns = _turns(batch.block_bases_NM[n, : batch.num_blocks_N[n]] - common, rotations)
            key_panels, value_panels, is_finite = make_panels(
                form, n, last, shape, batch, turns, keys, values, sinks, num_threads
            )
            if not is_finite.all():
                return False
            _attend(
                n, first, end, common, qkv, shape, batch, rotations, keys.shape[1], key_panels, value_panels, window,
                sinks, scale, softmax_sink, out, num_threads,
            )  # fmt: skip
    return True


@njit(inline="always")
def _common_base(batch, n, position):
    """The base of the block that holds a position of a sequence, but not of sinks, whose keys are not turned."""
    first = batch.num_sink_blocks_N[n]
    common = batch.block_bases_NM[n, first] if first < batch.num_blocks_N[n] else np.int64(0)
    for b in range(first, batch.num_blocks_N[n]):
        if common < batch.block_bases_NM[n, b] <= position:
            common = batch.block_bases_NM[n, b]
    return common


@njit(nogil=True, cache=KEEP_COMPILED)
def _turns(distances_B, rotations):
    """cos, sin and factor [B, D/2] that turn keys from the base of a block to one `distance` before it."""
    size, half = len(distances_B), rotations.cos_OD.shape[1]
    cos, sin, factor = np.empty((3, size, half), np.float32)
    for b in range(size):
        # Blocks that are farther away than the tables reach are seen by no query.
        distance = min(abs(distances_B[b]), len(rotations.cos_OD) - 1)
        is_later = distances_B[b] > 0
        for j in range(half):
            cos[b, j] = rotations.cos_OD[distance, j]
            sin[b, j] = rotations.sin_OD[distance, j] if is_later else -rotations.sin_OD[distance, j]
            decay = rotations.decay_OD[distance, j]
            factor[b, j] = np.float32(1) / max(decay, _LEAST_DECAY) if is_later else decay
    return cos, sin, factor


@njit(parallel=True, fastmath=FAST_MATH, nogil=True, cache=KEEP_COMPILED)
def _attend(
    n, first, end, common, qkv, shape, batch, rotations, block_size, key_panels, value_panels, window, sinks, scale,
    softmax_sink, out, num_threads,
):  # fmt: skip
    num_heads, num_kv_heads, dim = shape
    num_tiles = len(key_panels) // num_kv_heads
    width_of_all = _whole_chunks(num_tiles * ROWS_OF_A_TILE)
    num_groups, num_sink_blocks = (end - first + ROWS_OF_A_TILE - 1) // ROWS_OF_A_TILE, batch.num_sink_blocks_N[n]
    for thread in prange(num_threads):
        scores = np.empty((ROWS_OF_A_TILE, width_of_all), np.float32)
        queries, weights = empty_queries(key_panels, dim), empty_queries(key_panels, width_of_all)
        sums, totals = np.empty(ROWS_OF_A_TILE, np.float32), np.empty((ROWS_OF_A_TILE, dim), np.float32)
        begin_products(key_panels)
        for item in range(thread, num_groups * num_heads, num_threads):
            start, head = first + item // num_heads * ROWS_OF_A_TILE, item % num_heads
            positions = batch.positions_T[start : min(start + ROWS_OF_A_TILE, end)]
            kv_head, seen_from, seen_to = head // (num_heads // num_kv_heads), batch.num_blocks_N[n], 0
            for b in range(batch.num_blocks_N[n]):
                base, is_sink, place = batch.block_bases_NM[n, b], b < num_sink_blocks, b * block_size
                oldest = _seen(base, is_sink, positions[0], window, sinks, block_size)
                newest = _seen(base, is_sink, positions[-1], window, sinks, block_size)
                if oldest[0] >= newest[1]:
                    continue
                seen_to = b + 1
                if not is_sink:
                    seen_from = min(seen_from, b)
                    continue
                furthest = window + sinks - 1 if window else -1
                _rotate(qkv, start, head * dim, positions, base, furthest, rotations, queries)
                key_products(queries, key_panels, kv_head * num_tiles, place, place + block_size, scores)
            if seen_from < seen_to:
                _rotate(qkv, start, head * dim, positions, common, -1, rotations, queries)
                first_place, end_place = seen_from * block_size, seen_to * block_size
                key_products(queries, key_panels, kv_head * num_tiles, first_place, end_place, scores)
            width = _whole_chunks(seen_to * block_size)
            scores[:, seen_to * block_size : width] = _UNSEEN
            _hide(n, positions, batch, seen_to, block_size, window, sinks, scores)
            _weigh(scores[:, :width], scale, softmax_sink[head : head + 1], len(positions), sums)
            add_values(scores, width, weights, value_panels, kv_head * dim // ROWS_OF_A_TILE, totals)
            for i in range(len(positions)):
                for d in range(dim):
                    out[start + i, head * dim + d] = totals[i, d] / sums[i]
        end_products(key_panels)


@njit(inline="always")
def _whole_chunks(width):
    return (width + COLUMNS_OF_A_TILE - 1) // COLUMNS_OF_A_TILE * COLUMNS_OF_A_TILE


@njit(inline="always")
def _hide(n, positions, batch, num_blocks, block_size, window, sinks, scores):
    """Scores of keys that a query does not see = `_UNSEEN`."""
    for b in range(num_blocks):
        base, is_sink, place = batch.block_bases_NM[n, b], b < batch.num_sink_blocks_N[n], b * block_size
        oldest = _seen(base, is_sink, positions[0], window, sinks, block_size)
        newest = _seen(base, is_sink, positions[-1], window, sinks, block_size)
        if oldest[0] >= newest[1]:
            scores[:, place : place + block_size] = _UNSEEN
        elif oldest[1] < block_size or newest[0] > 0:  # not all queries see the whole block
            for i in range(len(positions)):
                seen = _seen(base, is_sink, positions[i], window, sinks, block_size)
                scores[i, place : place + max(0, seen[0])] = _UNSEEN
                scores[i, place + max(0, seen[1]) : place + block_size] = _UNSEEN


@njit(inline="always")
def _seen(base, is_sink, position, window, sinks, block_size):
    """start, stop of the offsets in a block that a query sees."""
    return visible_part(base, is_sink, position, position - window + 1 if window else 0, sinks, block_size)


@njit(inline="always")
def _rotate(qkv, start, column, positions, base, furthest, rotations, queries):
    """Rotate the queries from row `start` on for the keys of a block.

    `furthest`: the last position of queries for sinks, which a window caps; -1: it is not capped.
    """
    for i in range(len(positions)):
        position = positions[i] if furthest < 0 else min(positions[i], furthest)
        if position >= base:  # others see nothing of the block
            rotate_query(qkv, start + i, column, rotations, position - base, queries, i)


@njit(inline="always")
def _weigh(scores, scale, sink, count, sums):
    """scores = e^(scale · score - the largest), and their sums; see `attention.exponentials`."""
    for i in range(count):
        best = largest(scores[i], scores.shape[1])
        if len(sink):
            best = max(best, sink[0] / scale)
        sums[i] = exponentiate(scores[i], scores.shape[1], best, scale)
        if len(sink):
            sums[i] += exp(sink[0] - best * scale)
