"""Attention of a step's queries over the paged cache: tiles of prompts, and newest tokens."""

import math
from typing import NamedTuple

import torch
import triton

from stellarbyte.ops.triton.attention_kernels import decode_kernel, prefill_kernel
from stellarbyte.ops.triton.lora import Addend
from stellarbyte.ops.triton.overlap import overlapping
from stellarbyte.ops.triton.paged import UNLIMITED, HeadShape, PagedRows, Rotations, ring_length
from stellarbyte.ops.triton.rotate_write import write_kv as write_kv

# T tokens, N = (H + 2K) · D packed row, A = H · D, H query heads, K kv heads, G = H/K, D head dim
# X tiles of queries, B blocks, S block size, E entries of a block table, C programs of a decode launch

TILE_ROWS = 64  # queries of a prefill program
_TILE_KEYS = 64
_TILE_BYTES = 16 * 1024  # of keys, and of values: tiles of long keys have fewer of them
_BYTES_AHEAD = 32 * 1024  # of keys, and of values: loads in flight while a tile is computed
_MAX_TILES_AHEAD = 4
_MAX_SPLITS = 32
_NUM_WARPS = 4
_DECODE_REGISTERS = 128  # for each thread: with this limit one more program fits on a multiprocessor
_LOG2_E = math.log2(math.e)


class DecodeScratch(NamedTuple):
    """Partial sums of the programs that share a row, for the last of them. Allocated once: graphs keep the
    addresses."""

    sums_CGD: torch.Tensor  # float32: Σ 2^(score - peak) · value
    weights_CG: torch.Tensor  # float32: Σ 2^(score - peak)
    peaks_CG: torch.Tensor  # float32
    counters_TK: torch.Tensor  # int32: finished programs; 0 between launches

    @staticmethod
    def make(max_rows: int, heads: HeadShape, num_multiprocessors: int, device: torch.device) -> "DecodeScratch":
        """For up to `max_rows` rows with the splits of `num_splits_for`."""
        group = heads.num_heads // heads.num_kv_heads
        kv_heads = heads.num_kv_heads
        most = max(rows * num_splits_for(rows, kv_heads, num_multiprocessors) for rows in range(1, max_rows + 1))
        programs = most * kv_heads
        return DecodeScratch(
            torch.empty(programs, group, heads.head_dim, device=device),
            torch.empty(programs, group, device=device),
            torch.empty(programs, group, device=device),
            torch.zeros(max_rows, kv_heads, dtype=torch.int32, device=device),
        )


def num_multiprocessors_of(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; otherwise 1: Triton's interpreter runs one program at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def num_splits_for(num_rows: int, num_kv_heads: int, num_multiprocessors: int) -> int:
    """Most programs that share a row of `decode_attention`: about four in total for each multiprocessor."""
    wanted = 4 * num_multiprocessors / (num_rows * num_kv_heads)
    return min(_MAX_SPLITS, 1 << max(0, round(math.log2(wanted))))


def prefill_attention(
    qkv_TN: torch.Tensor,
    out_TA: torch.Tensor,
    keys_BSKD: torch.Tensor,
    values_BSKD: torch.Tensor,
    rows: PagedRows,
    tile_starts_X: torch.Tensor,
    tile_counts_X: torch.Tensor,
    rotations: Rotations,
    heads: HeadShape,
    *,
    window: int | None,
    sink_tokens: int,
    score_scale: float,
    softcap: float | None,
    softmax_sink_H: torch.Tensor | None,
    q_norm_D: torch.Tensor | None,
    norm_eps: float,
) -> None:
    """out = attention of the rows of all tiles, after `write_kv` of their keys. Other rows of out do not change.

    Args:
        qkv_TN, out_TA: contiguous, float32 or bfloat16; queries neither normed nor rotated.
        keys_BSKD, values_BSKD: in that dtype or in fp8 (e4m3).
        tile_starts_X, tile_counts_X: int32; a tile is up to `TILE_ROWS` rows of one sequence with consecutive
            positions, given by its first row and their number. A tile of 0 rows is ignored.
        rotations: for every distance to a visible block's base, and for 0..TILE_ROWS-1.
        window: tokens that a query sees, including its own; 0 or None: all.
        softcap: c of c · tanh(score / c) on scaled scores; None: no cap.
        softmax_sink_H: one more logit of each head in the softmax, without a value; None: none.
    """
    tables_NE, constants = rows.tables_NE, _constants(keys_BSKD, heads, sink_tokens)
    # Eight warps for two heads that share keys, or for one head with long rows.
    heads_together, num_warps = 1, _NUM_WARPS
    if heads.head_dim * keys_BSKD.element_size() > 256:
        num_warps = 2 * _NUM_WARPS
    elif heads.num_heads // heads.num_kv_heads % 2 == 0:
        heads_together, num_warps = 2, 2 * _NUM_WARPS
    prefill_kernel[(len(tile_starts_X), heads.num_heads // heads_together)](
        qkv_TN, out_TA, keys_BSKD, values_BSKD, rows.positions_T, rows.sequences_T, tables_NE, tables_NE.stride(0),
        ring_length(rows, keys_BSKD.shape[1], sink_tokens), tile_starts_X, tile_counts_X, *rotations, q_norm_D,
        norm_eps, score_scale * _LOG2_E, _in_base_2(softcap), softmax_sink_H, window or UNLIMITED, ROWS=TILE_ROWS,
        HEADS=heads_together, **constants, num_warps=num_warps,
    )  # fmt: skip


def decode_attention(
    qkv_TN: torch.Tensor,
    out_TA: torch.Tensor,
    keys_BSKD: torch.Tensor,
    values_BSKD: torch.Tensor,
    rows: PagedRows,
    scratch: DecodeScratch,
    rotations: Rotations,
    heads: HeadShape,
    *,
    window: int | None,
    sink_tokens: int,
    score_scale: float,
    softcap: float | None,
    softmax_sink_H: torch.Tensor | None,
    q_norm_D: torch.Tensor | None,
    k_norm_D: torch.Tensor | None,
    norm_eps: float,
    num_splits: int,
    addend: Addend | None = None,
    stores: bool = True,
) -> None:
    """Write keys and values of the newest token of each sequence, one in each row; out = their attention.

    `addend` is added to the packed rows. Up to `num_splits` programs, a power of two, share the keys of a row; the
    bits of a row depend on that number, but not on other rows. Other arguments as in `write_kv` and
    `prefill_attention`. Rows may share a sequence only if their results are unused (padding rows), or without
    `stores`: then `write_kv` has already written the keys and values of all rows.
    """
    num_programs = len(qkv_TN) * heads.num_kv_heads * num_splits
    assert num_splits == 1 or (num_programs <= len(scratch.sums_CGD) and len(qkv_TN) <= len(scratch.counters_TK)), (
        "the scratch is for fewer rows or splits"
    )
    tables_NE = rows.tables_NE
    group = heads.num_heads // heads.num_kv_heads
    decode_kernel[(len(qkv_TN), heads.num_kv_heads, num_splits)](
        qkv_TN, *((None, None) if addend is None else addend), out_TA, keys_BSKD, values_BSKD, rows.positions_T,
        rows.sequences_T, tables_NE, tables_NE.stride(0), ring_length(rows, keys_BSKD.shape[1], sink_tokens),
        *scratch, *rotations, q_norm_D, k_norm_D, norm_eps, score_scale * _LOG2_E, _in_base_2(softcap), softmax_sink_H,
        window or UNLIMITED, SPLITS=num_splits, GROUP=max(16, triton.next_power_of_2(group)),
        HEADS=triton.next_power_of_2(group), STORES=stores,
        **_constants(keys_BSKD, heads, sink_tokens) | {"num_stages": 3 if keys_BSKD.element_size() == 1 else 2},
        num_warps=_NUM_WARPS, maxnreg=_DECODE_REGISTERS, **overlapping(qkv_TN.device),
    )  # fmt: skip


def _in_base_2(softcap: float | None) -> float | None:
    return None if softcap is None else softcap * _LOG2_E


def _constants(keys_BSKD: torch.Tensor, heads: HeadShape, sink_tokens: int) -> dict[str, int]:
    """Compile-time constants of both kernels. A block with more keys than a tile is read as several tiles."""
    block_size, width = keys_BSKD.shape[1], max(16, triton.next_power_of_2(heads.head_dim))
    key_bytes = width * keys_BSKD.element_size()
    keys_per_tile = max(16, min(_TILE_KEYS, _TILE_BYTES // key_bytes, triton.next_power_of_2(block_size)))
    return {
        "NUM_HEADS": heads.num_heads, "NUM_KV_HEADS": heads.num_kv_heads, "HEAD_DIM": heads.head_dim,
        "SINKS": sink_tokens, "BLOCK_SIZE": block_size, "KEYS": keys_per_tile, "WIDTH": width,
        "PAIRS": max(16, triton.next_power_of_2(heads.head_dim // 2)),
        "num_stages": 1 + min(_MAX_TILES_AHEAD, max(1, _BYTES_AHEAD // (keys_per_tile * key_bytes))),
    }  # fmt: skip
