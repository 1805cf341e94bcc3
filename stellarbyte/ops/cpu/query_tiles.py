"""Products of 16 queries with the keys and values of a sequence, for `tiled_attention`, in one of two forms.

SPLIT: by the matrix unit, with numbers that are split for it (`panels.tiles`). FLOATS: in float32, several queries and
panels at a time. Functions without a body are for compiled code, which chooses the form by the kind of its arrays.
"""

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

from stellarbyte.ops.cpu import FAST_MATH, KEEP_COMPILED
from stellarbyte.ops.cpu.panels.sizes import HAS_LARGE_TILES
from stellarbyte.ops.cpu.panels.strips import QUERIES_AT_ONCE, query_strip_1, query_strip_2
from stellarbyte.ops.cpu.panels.tiles import (
    COLUMNS_OF_A_TILE,
    ROWS_OF_A_TILE,
    configure_tiles,
    release_tiles,
    rotate_row,
    split_panel,
    split_row,
    strip_1,
    strip_2,
    strip_4,
)

# T tokens, K key/value heads, D head dim, L places in live blocks, rounded up to whole chunks of 32

SPLIT, FLOATS = np.zeros(0, np.uint32), np.zeros(0, np.float32)
PANELS_AT_ONCE = 2 if HAS_LARGE_TILES else 1


def make_panels(form, n, last, shape, batch, turns, keys, values, sinks, num_threads):
    """Turned keys and the values of a sequence, panels of 16 places and of 16 dims.

    Values that no query up to the position `last` sees are 0 there. Also returns of each thread whether all others that
    it met are finite.

    SPLIT: [K · L/16, D/32, 2, 16, 16] and [K · D/16, L/32, 2, 16, 16]. FLOATS: [K · L/16, D, 16] and [K · D/16, L, 16].
    """
    raise NotImplementedError


def empty_queries(panels, width):
    """16 rows of `width` numbers to multiply with such panels: zeros."""
    raise NotImplementedError


def rotate_query(qkv, row, column, rotations, distance, queries, i):
    """Row i of `queries` = a head of a row of qkv, rotated as a query for a key that is so far from its base."""
    raise NotImplementedError


def key_products(queries, panels, first, start, stop, scores):
    """scores[:, start:stop] = products with the keys of these places, whose sequence has the panels from `first` on."""
    raise NotImplementedError


def add_values(scores, width, weights, panels, first, totals):
    """totals [16, D] = Σ scores[:, l] · values of place l < width; `weights` is memory of `empty_queries` for them."""
    raise NotImplementedError


def begin_products(panels):
    """Prepare the thread for products with such panels, until `end_products`."""
    raise NotImplementedError


def end_products(panels):
    """After the last product of a thread."""
    raise NotImplementedError


@njit(nogil=True, cache=KEEP_COMPILED)  # by its bits, as fast arithmetic knows no NaN
def _is_finite(row):
    for bits in row.view(np.uint32):
        if bits & np.uint32(0x7F800000) == np.uint32(0x7F800000):
            return False
    return True


@njit(inline="always")
def _values_of(n, last, batch, values, sinks, head, column, panel):
    """panel [L, 16] = the values of all places; returns whether they are finite."""
    block_size, is_finite = values.shape[1], True
    for b in range(batch.num_blocks_N[n]):
        block, base = batch.block_tables_NM[n, b], batch.block_bases_NM[n, b]
        end = min(last + 1, sinks) if b < batch.num_sink_blocks_N[n] else last + 1
        for i in range(block_size):
            if base + i < end:
                row = values[block, i, head, column : column + ROWS_OF_A_TILE]
                panel[b * block_size + i] = row
                is_finite &= _is_finite(row)
            else:
                panel[b * block_size + i] = np.float32(0)
    panel[batch.num_blocks_N[n] * block_size :] = np.float32(0)
    return is_finite


@njit(parallel=True, fastmath=FAST_MATH, nogil=True, cache=KEEP_COMPILED)
def _split_panels(n, last, shape, batch, turns, keys, values, sinks, num_threads):
    _, num_kv_heads, dim = shape
    block_size, num_blocks = keys.shape[1], batch.num_blocks_N[n]
    num_tiles = num_blocks * block_size // ROWS_OF_A_TILE
    num_chunks = (num_blocks * block_size + COLUMNS_OF_A_TILE - 1) // COLUMNS_OF_A_TILE
    steps, strips = dim // COLUMNS_OF_A_TILE, dim // ROWS_OF_A_TILE
    key_rows = keys.reshape((-1, dim))
    key_panels = np.empty((num_kv_heads * num_tiles, steps, 2, 16, ROWS_OF_A_TILE), np.uint32)
    value_panels = np.empty((num_kv_heads * strips, num_chunks, 2, 16, ROWS_OF_A_TILE), np.uint32)
    is_finite = np.ones(num_threads, np.bool_)
    for thread in prange(num_threads):
        rows = np.empty((1, steps, 2, ROWS_OF_A_TILE, COLUMNS_OF_A_TILE), np.uint16)
        words = rows.view(np.uint32)  # pairs of dims
        for item in range(thread, num_kv_heads * num_tiles, num_threads):
            head, tile = item // num_tiles, item % num_tiles
            b, place = tile * ROWS_OF_A_TILE // block_size, tile * ROWS_OF_A_TILE % block_size
            first = (batch.block_tables_NM[n, b] * block_size + place) * num_kv_heads + head
            for i in range(ROWS_OF_A_TILE):
                if b < batch.num_sink_blocks_N[n]:
                    split_row(key_rows, first + i * num_kv_heads, rows, 0, i)
                else:
                    rotate_row(key_rows, first + i * num_kv_heads, 0, turns[0], turns[1], turns[2], b, rows, i)
            for step in range(steps):
                for part in range(2):
                    source, target = words[0, step, part], key_panels[item, step, part]
                    for pair in range(16):
                        for i in range(ROWS_OF_A_TILE):
                            target[pair, i] = source[i, pair]
        panel = np.empty((num_chunks * COLUMNS_OF_A_TILE, ROWS_OF_A_TILE), np.float32)
        for item in range(thread, num_kv_heads * strips, num_threads):
            head, column = item // strips, item % strips * ROWS_OF_A_TILE
            is_finite[thread] &= _values_of(n, last, batch, values, sinks, head, column, panel)
            split_panel(panel, value_panels, item)
    return key_panels, value_panels, is_finite


@njit(inline="always")
def _rotated(source, cos, sin, factor, target):
    half = len(cos)
    for j in range(half):
        x, y, c, s = source[j], source[half + j], cos[j] * factor[j], sin[j] * factor[j]
        target[j], target[half + j] = x * c - y * s, y * c + x * s


@njit(parallel=True, fastmath=FAST_MATH, nogil=True, cache=KEEP_COMPILED)
def _float_panels(n, last, shape, batch, turns, keys, values, sinks, num_threads):
    _, num_kv_heads, dim = shape
    block_size, num_places = keys.shape[1], batch.num_blocks_N[n] * keys.shape[1]
    num_tiles, strips = num_places // ROWS_OF_A_TILE, dim // ROWS_OF_A_TILE
    length = (num_places + COLUMNS_OF_A_TILE - 1) // COLUMNS_OF_A_TILE * COLUMNS_OF_A_TILE
    key_panels = np.empty((num_kv_heads * num_tiles, dim, ROWS_OF_A_TILE), np.float32)
    value_panels = np.empty((num_kv_heads * strips, length, ROWS_OF_A_TILE), np.float32)
    is_finite = np.ones(num_threads, np.bool_)
    for thread in prange(num_threads):
        row = np.empty(dim, np.float32)
        for item in range(thread, num_kv_heads * num_tiles, num_threads):
            head, tile = item // num_tiles, item % num_tiles
            b, place = tile * ROWS_OF_A_TILE // block_size, tile * ROWS_OF_A_TILE % block_size
            block, target = batch.block_tables_NM[n, b], key_panels[item]
            for i in range(ROWS_OF_A_TILE):
                key = keys[block, place + i, head]
                if b >= batch.num_sink_blocks_N[n]:
                    _rotated(key, turns[0][b], turns[1][b], turns[2][b], row)
                    key = row
                for d in range(dim):
                    target[d, i] = key[d]
        for item in range(thread, num_kv_heads * strips, num_threads):
            head, column = item // strips, item % strips * ROWS_OF_A_TILE
            is_finite[thread] &= _values_of(n, last, batch, values, sinks, head, column, value_panels[item])
    return key_panels, value_panels, is_finite


@overload(make_panels)
def _make_panels(form, n, last, shape, batch, turns, keys, values, sinks, num_threads):
    def split(form, n, last, shape, batch, turns, keys, values, sinks, num_threads):
        return _split_panels(n, last, shape, batch, turns, keys, values, sinks, num_threads)

    def floats(form, n, last, shape, batch, turns, keys, values, sinks, num_threads):
        return _float_panels(n, last, shape, batch, turns, keys, values, sinks, num_threads)

    return split if form.dtype == types.uint32 else floats


@overload(empty_queries)
def _empty_queries(panels, width):
    def split(panels, width):
        return np.zeros((1, width // COLUMNS_OF_A_TILE, 2, ROWS_OF_A_TILE, COLUMNS_OF_A_TILE), np.uint16)

    def floats(panels, width):
        return np.zeros((ROWS_OF_A_TILE, width), np.float32)

    return split if panels.dtype == types.uint32 else floats


@overload(rotate_query)
def _rotate_query(qkv, row, column, rotations, distance, queries, i):
    def split(qkv, row, column, rotations, distance, queries, i):
        rotate_row(
            qkv, row, column, rotations.cos_OD, rotations.sin_OD, rotations.decay_OD, distance, queries, i
        )  # fmt: skip

    def floats(qkv, row, column, rotations, distance, queries, i):
        head = qkv[row, column : column + queries.shape[1]]
        cos, sin, decay = rotations.cos_OD[distance], rotations.sin_OD[distance], rotations.decay_OD[distance]
        _rotated(head, cos, sin, decay, queries[i])

    return split if queries.dtype == types.uint16 else floats


@overload(key_products)
def _key_products(queries, panels, first, start, stop, scores):
    def split(queries, panels, first, start, stop, scores):
        in_fours = start + (stop - start) // (4 * ROWS_OF_A_TILE) * (4 * ROWS_OF_A_TILE)
        for i in range(start, in_fours, 4 * ROWS_OF_A_TILE):
            strip_4(queries, 0, panels, first + i // ROWS_OF_A_TILE, panels.shape[1], scores, i)
        for i in range(in_fours, stop, ROWS_OF_A_TILE):
            strip_1(queries, 0, panels, first + i // ROWS_OF_A_TILE, panels.shape[1], scores, i)

    def floats(queries, panels, first, start, stop, scores):
        _float_products(queries, panels.shape[1], panels, first + start // ROWS_OF_A_TILE, scores, start, stop)

    return split if panels.dtype == types.uint32 else floats


@njit(inline="always")
def _float_products(rows, length, panels, first, out, start, stop):
    """out[:, start:stop] = the first `length` columns of 16 rows times the panels from `first` on."""
    width = PANELS_AT_ONCE * ROWS_OF_A_TILE
    in_pairs = start + (stop - start) // width * width
    for row in range(0, ROWS_OF_A_TILE, QUERIES_AT_ONCE):
        for i in range(start, in_pairs, width):
            panel = first + (i - start) // ROWS_OF_A_TILE
            if PANELS_AT_ONCE == 2:
                query_strip_2(rows, row, panels, panel, length, out, i)
            else:
                query_strip_1(rows, row, panels, panel, length, out, i)
        for i in range(in_pairs, stop, ROWS_OF_A_TILE):
            query_strip_1(rows, row, panels, first + (i - start) // ROWS_OF_A_TILE, length, out, i)


@overload(add_values)
def _add_values(scores, width, weights, panels, first, totals):
    def split(scores, width, weights, panels, first, totals):
        chunks, strips = width // COLUMNS_OF_A_TILE, totals.shape[1] // ROWS_OF_A_TILE
        for i in range(ROWS_OF_A_TILE):
            split_row(scores, i, weights, 0, i)
        for strip in range(0, strips - 3, 4):
            strip_4(weights, 0, panels, first + strip, chunks, totals, strip * ROWS_OF_A_TILE)
        for strip in range(strips - strips % 4, strips, 2):
            strip_2(weights, 0, panels, first + strip, chunks, totals, strip * ROWS_OF_A_TILE)

    def floats(scores, width, weights, panels, first, totals):
        _float_products(scores, width, panels, first, totals, 0, totals.shape[1])

    return split if panels.dtype == types.uint32 else floats


@overload(begin_products)
def _begin_products(panels):
    def split(panels):
        configure_tiles()

    def floats(panels):
        pass

    return split if panels.dtype == types.uint32 else floats


@overload(end_products)
def _end_products(panels):
    def split(panels):
        release_tiles()

    def floats(panels):
        pass

    return split if panels.dtype == types.uint32 else floats
