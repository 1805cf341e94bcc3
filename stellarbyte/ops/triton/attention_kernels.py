"""The kernels of paged attention, which `attention` launches.

Keys lie in the cache rotated relative to their block's base P, so queries at m are rotated by m - P for each block
(numerics: "Keys are stored relative to their block"). Rotations, scores and sums are float32; products take numbers in
the cache's dtype; fp8 keys and values become float16 on loading, two in one instruction. A block of many keys is read
in parts: a tile is a block or a part of one.
"""

import triton
import triton.language as tl

from stellarbyte.ops.triton.gates import soft_cap
from stellarbyte.ops.triton.overlap import wait_for_inputs
from stellarbyte.ops.triton.paged import table_entry
from stellarbyte.ops.triton.rotate_write import (
    add_heads,
    amplify,
    load_heads,
    norm_heads,
    rotate,
    rotation,
    store_newest,
)

# M queries of a program, N keys of a tile, P pairs of a head (D/2, padded), J both halves of it, W head dim padded
# R splits, G heads that share a kv head
# scale: of scores, including log2(e), as all exponentials are powers of 2; softcap: of scaled scores, None: no cap
# softmax_sink: logits [H] without keys, in base e; None: none. SINKS: first tokens, which windows do not hide

_NOTHING_SEEN = tl.constexpr(-1e30)  # initial largest score; finite, to avoid inf - inf
_LOG2_E = tl.constexpr(1.4426950408889634)
_READ_TOGETHER = tl.constexpr(8)  # programs whose sums are read at once
_OUT_OF_SIGHT = tl.constexpr(0x7FFFFFFF)  # the position of an empty slot; after every query


@triton.jit
def _tiles_before(count, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Number of tiles of keys for the first `count` tokens of a row of blocks."""
    PARTS: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    return count // BLOCK_SIZE * PARTS + (count % BLOCK_SIZE + KEYS - 1) // KEYS


@triton.jit
def _tile_of(token, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """The tile of a token in a row of blocks."""
    PARTS: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    return token // BLOCK_SIZE * PARTS + token % BLOCK_SIZE // KEYS


@triton.jit
def _block_of(tile, is_sink, table, ring, SINKS: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """The block (int64) of a tile; any entry of the table if no query sees the tile."""
    number = tile // ((BLOCK_SIZE + KEYS - 1) // KEYS)
    return tl.load(table + table_entry(number, is_sink, ring, SINKS, BLOCK_SIZE)).to(tl.int64)


@triton.jit
def _place_of(tile, is_sink, SINKS: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """The base position of a tile's block, and the offsets of the tile's keys in it, [N]."""
    PARTS: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    base = tile // PARTS * BLOCK_SIZE + tl.where(is_sink, 0, SINKS)
    return base, tile % PARTS * KEYS + tl.arange(0, KEYS)


@triton.jit
def _first_weights(softmax_sink, head_M, is_first, inside_M):
    """Weights and peaks of the online softmax before any key: those of the sinks' logits, in the one program of a row
    that is its first."""
    weight_M = tl.zeros(head_M.shape, tl.float32)
    peak_M = tl.full(head_M.shape, _NOTHING_SEEN, tl.float32)
    if softmax_sink is not None:
        logit_M = tl.load(softmax_sink + head_M, mask=inside_M, other=0.0).to(tl.float32) * _LOG2_E
        weight_M = tl.where(is_first, 1.0, weight_M)
        peak_M = tl.where(is_first, logit_M, peak_M)
    return weight_M, peak_M


@triton.jit
def _meet(
    first_MP, second_MP, keys, values, block, kv_head, offset_N, readable_N, visible_MN, scale, softcap,
    sum_MW, weight_M, peak_M, dtype: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: queries rotated for a block, and a tile of its keys. Returns sums, weights and
    peaks.

    Slots that are not `readable` contain arbitrary numbers, even NaN: they are not loaded, and their scores invisible.
    """
    start = (block * BLOCK_SIZE * NUM_KV_HEADS + kv_head) * HEAD_DIM
    place_N1 = offset_N[:, None] * (NUM_KV_HEADS * HEAD_DIM)
    pair_1P = tl.arange(0, PAIRS)[None, :]
    readable = readable_N[:, None] & (pair_1P < HEAD_DIM // 2)
    first_NP = tl.load(keys + start + place_N1 + pair_1P, mask=readable, other=0.0)
    second_NP = tl.load(keys + start + place_N1 + HEAD_DIM // 2 + pair_1P, mask=readable, other=0.0)
    score_MN = tl.dot(first_MP.to(dtype), tl.trans(first_NP.to(dtype)), input_precision="ieee")
    score_MN = tl.dot(second_MP.to(dtype), tl.trans(second_NP.to(dtype)), score_MN, input_precision="ieee")
    score_MN *= scale
    if softcap is not None:
        score_MN = soft_cap(score_MN, softcap)
    score_MN = tl.where(visible_MN & readable_N[None, :], score_MN, float("-inf"))

    return _weigh(score_MN, values + start, place_N1, readable_N, sum_MW, weight_M, peak_M, dtype, HEAD_DIM, WIDTH)


@triton.jit
def _weigh(
    score_MN, values, place_N1, readable_N, sum_MW, weight_M, peak_M, dtype: tl.constexpr, HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, from the scores of a tile's keys and the place of its values."""
    new_peak_M = tl.maximum(peak_M, tl.max(score_MN, axis=1))
    shrink_M = tl.exp2(peak_M - new_peak_M)
    weight_MN = tl.exp2(score_MN - new_peak_M[:, None])
    column_1W = tl.arange(0, WIDTH)[None, :]
    value_NW = tl.load(values + place_N1 + column_1W, mask=readable_N[:, None] & (column_1W < HEAD_DIM), other=0.0)
    sum_MW = tl.dot(weight_MN.to(dtype), value_NW.to(dtype), sum_MW * shrink_M[:, None], input_precision="ieee")
    return sum_MW, weight_M * shrink_M + tl.sum(weight_MN, axis=1), new_peak_M


@triton.jit
def prefill_kernel(
    qkv, out, keys, values, positions, sequences, tables, table_stride, ring, tile_starts, tile_counts,
    cos, sin, log_decay, gain, q_norm, norm_eps, scale, softcap, softmax_sink, window,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SINKS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """HEADS heads, of one kv head, of one tile of queries: a tile of keys is loaded once for all of them."""
    count = tl.load(tile_counts + tl.program_id(0))
    if count == 0:
        return
    dtype: tl.constexpr = tl.float16 if keys.dtype.element_ty == tl.float8e4nv else keys.dtype.element_ty
    start = tl.load(tile_starts + tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1) * HEADS
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    query_M = tl.arange(0, HEADS * ROWS)
    row_M = query_M % ROWS
    head_M1 = (head + query_M // ROWS)[:, None]
    inside_M = row_M < count
    first = tl.load(positions + start)
    last = first + count - 1
    position_M = first + tl.minimum(row_M, count - 1)  # rows beyond the tile repeat its last one
    table = tables + tl.load(sequences + start).to(tl.int64) * table_stride

    packed_M1 = qkv + (start + row_M)[:, None] * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM) + head_M1 * HEAD_DIM
    first_MP, second_MP = load_heads(packed_M1, inside_M, HEAD_DIM, PAIRS)
    if q_norm is not None:
        first_MP, second_MP = norm_heads(first_MP, second_MP, q_norm, norm_eps, HEAD_DIM, PAIRS)
    if gain is not None:
        first_MP, second_MP = amplify(first_MP, second_MP, gain, HEAD_DIM, PAIRS)
    first_MP, second_MP = first_MP * scale, second_MP * scale
    sum_MW = tl.zeros([HEADS * ROWS, WIDTH], tl.float32)
    weight_M, peak_M = _first_weights(softmax_sink, head + query_M // ROWS, True, inside_M)

    # Each row has its own distance to a sink, since the window caps it.
    capped_M = tl.minimum(position_M, window + SINKS - 1)
    for tile in range(0, _tiles_before(tl.minimum(last + 1, SINKS), BLOCK_SIZE, KEYS)):
        block = _block_of(tile, True, table, ring, SINKS, BLOCK_SIZE, KEYS)
        base, offset_N = _place_of(tile, True, SINKS, BLOCK_SIZE, KEYS)
        distance_M = capped_M - base
        cos_MP, sin_MP = rotation(distance_M, inside_M & (distance_M >= 0), cos, sin, log_decay, 1, HEAD_DIM, PAIRS)
        first_turned_MP, second_turned_MP = rotate(first_MP, second_MP, cos_MP, sin_MP)
        key_N = tl.where((offset_N < BLOCK_SIZE) & (base + offset_N < SINKS), base + offset_N, _OUT_OF_SIGHT)
        readable_N = key_N <= last
        visible_MN = key_N[None, :] <= position_M[:, None]
        sum_MW, weight_M, peak_M = _meet_many(
            first_turned_MP, second_turned_MP, keys, values, block, kv_head, offset_N, readable_N, visible_MN,
            softcap, sum_MW, weight_M, peak_M, dtype, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, PAIRS, WIDTH,
        )  # fmt: skip

    # For other blocks it is the distance of the tile's first row, plus the row's own distance from that, rotated once.
    cos_MP, sin_MP = rotation(row_M, inside_M, cos, sin, log_decay, 1, HEAD_DIM, PAIRS)
    first_MP, second_MP = rotate(first_MP, second_MP, cos_MP, sin_MP)
    # Tiles in which every query sees every key need no mask. They come first, then the tiles before and after them.
    first_tile = _tile_of(tl.maximum(first - window + 1 - SINKS, 0), BLOCK_SIZE, KEYS)
    end_tile = _tiles_before(tl.maximum(last + 1 - SINKS, 0), BLOCK_SIZE, KEYS)
    first_whole, num_whole = first_tile, 0
    if BLOCK_SIZE % KEYS == 0:
        first_whole = tl.cdiv(tl.maximum(last - window + 1 - SINKS, 0), KEYS)
        num_whole = tl.maximum(tl.maximum(first + 1 - SINKS, 0) // KEYS - first_whole, 0)
        sum_MW, weight_M, peak_M = _meet_tiles(
            first_whole, first_whole + num_whole, first_whole, 0, first_MP, second_MP, position_M, first, last, window,
            keys, values, kv_head, table, ring, cos, sin, log_decay, softcap, sum_MW, weight_M, peak_M, False,
            dtype, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, SINKS, ROWS, KEYS, PAIRS, WIDTH,
        )  # fmt: skip
    sum_MW, weight_M, peak_M = _meet_tiles(
        first_tile, end_tile - num_whole, first_whole, num_whole, first_MP, second_MP, position_M, first, last, window,
        keys, values, kv_head, table, ring, cos, sin, log_decay, softcap, sum_MW, weight_M, peak_M, True,
        dtype, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, SINKS, ROWS, KEYS, PAIRS, WIDTH,
    )  # fmt: skip

    column_1W = tl.arange(0, WIDTH)[None, :]
    target_MW = out + (start + row_M)[:, None] * (NUM_HEADS * HEAD_DIM) + head_M1 * HEAD_DIM + column_1W
    average_MW = (sum_MW / weight_M[:, None]).to(out.dtype.element_ty)
    tl.store(target_MW, average_MW, mask=inside_M[:, None] & (column_1W < HEAD_DIM))


@triton.jit
def _meet_tiles(
    begin, end, gap, gap_length, first_MP, second_MP, position_M, first, last, window, keys, values, kv_head, table,
    ring, cos, sin, log_decay, softcap, sum_MW, weight_M, peak_M, MASKED: tl.constexpr, dtype: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, SINKS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Attend to the tiles begin..end - 1; numbers from `gap` on are increased by `gap_length`."""
    next_tile = begin + tl.where(begin < gap, 0, gap_length)
    next_block = _block_of(next_tile, False, table, ring, SINKS, BLOCK_SIZE, KEYS)
    for i in range(begin, end):
        tile, block = (
            next_tile,
            next_block,
        )  # looked up an iteration early, so that the loads of keys do not wait for it
        next_tile = i + 1 + tl.where(i + 1 < gap, 0, gap_length)
        next_block = _block_of(next_tile, False, table, ring, SINKS, BLOCK_SIZE, KEYS)
        base, offset_N = _place_of(tile, False, SINKS, BLOCK_SIZE, KEYS)
        distance_1 = first - base + tl.arange(0, 1)
        cos_1P, sin_1P = rotation(distance_1, distance_1 > -ROWS, cos, sin, log_decay, 1, HEAD_DIM, PAIRS)
        first_turned_MP, second_turned_MP = rotate(first_MP, second_MP, cos_1P, sin_1P)
        readable_N, visible_MN = offset_N >= 0, None
        if MASKED:
            key_N = tl.where(offset_N < BLOCK_SIZE, base + offset_N, _OUT_OF_SIGHT)
            readable_N = key_N <= last
            visible_MN = (key_N[None, :] <= position_M[:, None]) & (key_N[None, :] > position_M[:, None] - window)
        sum_MW, weight_M, peak_M = _meet_many(
            first_turned_MP, second_turned_MP, keys, values, block, kv_head, offset_N, readable_N, visible_MN,
            softcap, sum_MW, weight_M, peak_M, dtype, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, PAIRS, WIDTH,
        )  # fmt: skip
    return sum_MW, weight_M, peak_M


@triton.jit
def _meet_many(
    first_MP, second_MP, keys, values, block, kv_head, offset_N, readable_N, visible_MN, softcap, sum_MW, weight_M,
    peak_M, dtype: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PAIRS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`_meet` for many queries, already scaled: joins their halves into one product, which is faster then.

    Without `visible_MN` every query sees every key.
    """
    start = (block * BLOCK_SIZE * NUM_KV_HEADS + kv_head) * HEAD_DIM
    place_N1 = offset_N[:, None] * (NUM_KV_HEADS * HEAD_DIM)
    column_1J = tl.arange(0, 2 * PAIRS)[None, :]
    pair_1J = column_1J % PAIRS
    key_NJ = tl.load(
        keys + start + place_N1 + column_1J // PAIRS * (HEAD_DIM // 2) + pair_1J,
        mask=readable_N[:, None] & (pair_1J < HEAD_DIM // 2),
        other=0.0,
    )
    halves_M2P = tl.permute(tl.join(first_MP.to(dtype), second_MP.to(dtype)), (0, 2, 1))
    query_MJ = tl.reshape(halves_M2P, [first_MP.shape[0], 2 * PAIRS])
    score_MN = tl.dot(query_MJ, tl.trans(key_NJ.to(dtype)), input_precision="ieee")
    if softcap is not None:
        score_MN = soft_cap(score_MN, softcap)
    if visible_MN is not None:
        score_MN = tl.where(visible_MN, score_MN, float("-inf"))
    return _weigh(score_MN, values + start, place_N1, readable_N, sum_MW, weight_M, peak_M, dtype, HEAD_DIM, WIDTH)


@triton.jit
def decode_kernel(
    qkv, delta, delta_scales, out, keys, values, positions, sequences, tables, table_stride, ring,
    sums, weights, peaks, counters, cos, sin, log_decay, gain, q_norm, k_norm, norm_eps, scale, softcap, softmax_sink,
    window, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SINKS: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, PAIRS: tl.constexpr,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, STORES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """The heads of one kv head of one row, over one share of the visible tiles of keys. STORES: the row's own key and
    value are not in the cache yet."""
    dtype: tl.constexpr = tl.float16 if keys.dtype.element_ty == tl.float8e4nv else keys.dtype.element_ty
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    wait_for_inputs(OVERLAPS)
    position = tl.load(positions + row)
    first_tile = _tile_of(tl.maximum(position - window + 1 - SINKS, 0), BLOCK_SIZE, KEYS)
    sink_tiles = _tiles_before(tl.minimum(position + 1, SINKS), BLOCK_SIZE, KEYS)
    num_tiles = sink_tiles + _tiles_before(tl.maximum(position + 1 - SINKS, 0), BLOCK_SIZE, KEYS) - first_tile
    shares = tl.minimum(num_tiles, SPLITS)
    if split >= shares:
        return
    table = tables + tl.load(sequences + row).to(tl.int64) * table_stride
    # The row sees its sinks' tiles and those from first_tile on. Each is looked up an iteration early, so that the
    # loads of keys do not wait for the table and begin as soon as there is room.
    start = num_tiles * split // shares
    next_is_sink = start < sink_tiles
    next_tile = start + tl.where(next_is_sink, 0, first_tile - sink_tiles)
    next_block = _block_of(next_tile, next_is_sink, table, ring, SINKS, BLOCK_SIZE, KEYS)
    head_M = tl.arange(0, GROUP)
    inside_M = head_M < NUM_HEADS // NUM_KV_HEADS
    head_M += kv_head * (NUM_HEADS // NUM_KV_HEADS)
    query_M1 = row * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM) + head_M[:, None] * HEAD_DIM
    first_MP, second_MP = load_heads(qkv + query_M1, inside_M, HEAD_DIM, PAIRS)
    if delta is not None:
        first_MP, second_MP = add_heads(
            first_MP, second_MP, delta, delta_scales, row, query_M1, inside_M, HEAD_DIM, PAIRS
        )
    if STORES and split == shares - 1:  # the newest token is in this share
        kv_head_1 = kv_head + tl.arange(0, 1)
        store_newest(
            qkv, delta, delta_scales, row, kv_head_1, kv_head_1 >= 0, position, keys, values, table, ring,
            cos, sin, log_decay, k_norm, norm_eps, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, SINKS, PAIRS,
        )  # fmt: skip
        tl.debug_barrier()  # other threads of this program read it
    if q_norm is not None:
        first_MP, second_MP = norm_heads(first_MP, second_MP, q_norm, norm_eps, HEAD_DIM, PAIRS)
    if gain is not None:
        first_MP, second_MP = amplify(first_MP, second_MP, gain, HEAD_DIM, PAIRS)
    sum_MW = tl.zeros([GROUP, WIDTH], tl.float32)
    weight_M, peak_M = _first_weights(softmax_sink, head_M, split == 0, inside_M)
    for i in range(start, num_tiles * (split + 1) // shares):
        tile, is_sink, block = next_tile, next_is_sink, next_block
        next_is_sink = i + 1 < sink_tiles
        next_tile = i + 1 + tl.where(next_is_sink, 0, first_tile - sink_tiles)
        next_block = _block_of(next_tile, next_is_sink, table, ring, SINKS, BLOCK_SIZE, KEYS)
        base, offset_N = _place_of(tile, is_sink, SINKS, BLOCK_SIZE, KEYS)
        meeting = tl.where(is_sink, tl.minimum(position, window + SINKS - 1), position)
        distance_1 = meeting - base + tl.arange(0, 1)
        cos_1P, sin_1P = rotation(distance_1, distance_1 >= 0, cos, sin, log_decay, 1, HEAD_DIM, PAIRS)
        first_turned_MP, second_turned_MP = rotate(first_MP, second_MP, cos_1P, sin_1P)
        key_N = base + offset_N
        seen_N = tl.where(is_sink, key_N < SINKS, key_N > position - window)
        readable_N = (offset_N < BLOCK_SIZE) & (key_N <= position) & seen_N
        sum_MW, weight_M, peak_M = _meet(
            first_turned_MP, second_turned_MP, keys, values, block, kv_head, offset_N, readable_N, readable_N[None, :],
            scale, softcap, sum_MW, weight_M, peak_M, dtype, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, PAIRS, WIDTH,
        )  # fmt: skip

    column_1W = tl.arange(0, WIDTH)[None, :]
    inside = inside_M[:, None] & (column_1W < HEAD_DIM)
    target = out + row * (NUM_HEADS * HEAD_DIM)
    if shares == 1:
        average_MW = (sum_MW / weight_M[:, None]).to(out.dtype.element_ty)
        tl.store(target + head_M[:, None] * HEAD_DIM + column_1W, average_MW, mask=inside)
    else:
        # [row, kv head, split, G]
        place_M = ((row * NUM_KV_HEADS + kv_head) * SPLITS + split) * (NUM_HEADS // NUM_KV_HEADS) + tl.arange(0, GROUP)
        tl.store(sums + place_M[:, None] * HEAD_DIM + column_1W, sum_MW, mask=inside)
        tl.store(weights + place_M, weight_M, mask=inside_M)
        tl.store(peaks + place_M, peak_M, mask=inside_M)
        tl.debug_barrier()  # all threads have stored before one increments the counter
        counter = counters + row * NUM_KV_HEADS + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel") == shares - 1:
            tl.store(counter, 0)
            _combine(
                sums, weights, peaks, target, row, kv_head, shares, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, SPLITS, WIDTH,
                HEADS,
            )  # fmt: skip


@triton.jit
def _combine(
    sums, weights, peaks, target, row, kv_head, shares, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Combine the partial sums of all programs of a row and kv head into the outputs; reads from L2, where they were
    written: all that a few programs wrote at once, as each read takes longer than its arithmetic."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    head_G = tl.arange(0, HEADS)
    inside_G = head_G < GROUP
    column_W = tl.arange(0, WIDTH)
    inside_GW = inside_G[:, None] & (column_W < HEAD_DIM)[None, :]
    split_R = tl.arange(0, SPLITS)
    first = (row * NUM_KV_HEADS + kv_head) * SPLITS
    place_RG = (first + split_R)[:, None] * GROUP + head_G[None, :]
    there_RG = (split_R < shares)[:, None] & inside_G[None, :]
    peak_RG = tl.load(peaks + place_RG, mask=there_RG, other=_NOTHING_SEEN, cache_modifier=".cg")
    weight_RG = tl.load(weights + place_RG, mask=there_RG, other=0.0, cache_modifier=".cg")
    peak_G = tl.max(peak_RG, axis=0)
    weight_G = tl.sum(weight_RG * tl.exp2(peak_RG - peak_G[None, :]), axis=0)
    sum_GW = tl.zeros([HEADS, WIDTH], tl.float32)
    for split in range(0, shares, _READ_TOGETHER):
        for r in tl.static_range(_READ_TOGETHER):
            is_there_G = inside_G & (split + r < shares)
            place_G = (first + split + r) * GROUP + head_G
            own_peak_G = tl.load(peaks + place_G, mask=is_there_G, other=_NOTHING_SEEN, cache_modifier=".cg")
            part_GW = tl.load(
                sums + place_G[:, None] * HEAD_DIM + column_W[None, :], mask=inside_GW & is_there_G[:, None], other=0.0,
                cache_modifier=".cg",
            )  # fmt: skip
            sum_GW += part_GW * tl.exp2(own_peak_G - peak_G)[:, None]
    target_GW = target + (kv_head * GROUP + head_G)[:, None] * HEAD_DIM + column_W[None, :]
    tl.store(target_GW, (sum_GW / weight_G[:, None]).to(target.dtype.element_ty), mask=inside_GW)
