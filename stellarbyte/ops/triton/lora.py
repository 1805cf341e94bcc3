"""The addends of adapters in a mixed batch: out += scale · (d ⊙ W x + Bᵀ(A x)), in two launches; d: of DoRA.

The rows of a step come in segments, short runs of rows that use one slot of the bank. A program reads its share of a
slot's numbers once for all rows of its segment, so a step reads each segment's adapter once. Slots and ranks are read
on the device, so that a captured launch serves any batch of its size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from stellarbyte.lora.bank import LoraBank
from stellarbyte.ops.triton.overlap import overlapping, wait_for_inputs

# T rows of the step, X segments, K inputs, N outputs of adjacent projections, R ranks of projections together

SEGMENT_ROWS = 16  # minimum of the matrix units
PROMPT_SEGMENT_ROWS = 64  # tokens of a prompt for each read of an adapter's numbers
_BLOCK_K = 128
_BLOCK_N = 256
_BLOCK_R = 16
_MOST_PROJECTIONS = 3  # that share an input
_MAX_SPLITS = 8
_MAX_SPLIT_ROWS = 2048  # of a step whose segments are split
_SPLIT_PROGRAMS = {SEGMENT_ROWS: 64, PROMPT_SEGMENT_ROWS: 1024}  # more would cost `expand` more than it helps `shrink`


class LoraRows(NamedTuple):
    """The slots of a step's rows, on the device: int32, the scales float32.

    A segment is up to `segment_rows` rows from its start; one with a count of 0 is ignored. No row is in two segments.
    """

    segment_starts_X: torch.Tensor
    segment_counts_X: torch.Tensor
    segment_slots_X: torch.Tensor
    scales_T: torch.Tensor  # of each row's request; 0 for rows in no segment
    segment_rows: int = SEGMENT_ROWS


class Addend(NamedTuple):
    """A term to add to a product in rows with a scale other than 0; other rows are undefined."""

    delta_TN: torch.Tensor
    scales_T: torch.Tensor


def segments(slots_in_row_order: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Starts, counts and slots of the segments of rows with these slots; slot 0: no adapter."""
    starts: list[int] = []
    counts: list[int] = []
    slots: list[int] = []
    row = 0
    for slot, run in groupby(slots_in_row_order):
        stop = row + len(list(run))
        if slot:
            for start in range(row, stop, SEGMENT_ROWS):
                starts.append(start)
                counts.append(min(SEGMENT_ROWS, stop - start))
                slots.append(slot)
        row = stop
    return starts, counts, slots


def rows_of_one(num_rows: int, slot: int, scale: float, device: torch.device) -> LoraRows:
    """Of rows that all use one slot."""
    starts = torch.arange(0, num_rows, PROMPT_SEGMENT_ROWS, dtype=torch.int32, device=device)
    counts = (num_rows - starts).clamp(max=PROMPT_SEGMENT_ROWS)
    scales = torch.full((num_rows,), scale, dtype=torch.float32, device=device)
    return LoraRows(starts, counts, torch.full_like(starts, slot), scales, PROMPT_SEGMENT_ROWS)


@dataclass(frozen=True, kw_only=True)
class LoraScratch:
    """A x from `shrink` for `expand`: sums over parts of K, by row, with adjacent projections."""

    hidden: torch.Tensor  # float32, [T, splits, width] of a step's rows and splits
    width: int
    max_splits: int = _MAX_SPLITS

    @classmethod
    def make(
        cls, max_rows: int, max_rank: int, device: torch.device, *, max_splits: int = _MAX_SPLITS
    ) -> "LoraScratch":
        """For steps of up to `max_rows` rows; `max_rank` is the bank's. With a `max_splits` of 1, and `LoraRows` of
        always the same `segment_rows`, the bits of a row do not depend on the other rows."""
        width = -(-_MOST_PROJECTIONS * max_rank // 16) * 16
        rows = max(max_rows, max_splits * min(max_rows, _MAX_SPLIT_ROWS))
        hidden = torch.empty(rows * width, dtype=torch.float32, device=device)
        return cls(hidden=hidden, width=width, max_splits=max_splits)


def _num_splits(scratch: LoraScratch, lora: LoraRows, num_rows: int, num_inputs: int) -> int:
    """Number of programs that share a segment's K: more than one for few segments. Each value is compiled
    separately."""
    splits, num_segments = scratch.max_splits if num_rows <= _MAX_SPLIT_ROWS else 1, len(lora.segment_starts_X)
    most = min(_SPLIT_PROGRAMS[lora.segment_rows] // num_segments, num_inputs // _BLOCK_K)
    while splits > max(most, 1):
        splits //= 2
    return splits


def shrink(
    x_TK: torch.Tensor, scratch: LoraScratch, lora: LoraRows, bank: LoraBank, layer: int, projections: slice
) -> None:
    """Compute A x of each row in a segment, for projections that share the input x, into `scratch` for `expand`.

    Args:
        x_TK: contiguous, in the bank's dtype.
        projections: those of one input (see `Projections.shared_inputs`), at most 3.
    """
    num_rows, num_inputs = x_TK.shape
    num_segments = len(lora.segment_starts_X)
    assert x_TK.is_contiguous() and x_TK.dtype == bank.dtype
    if not num_segments:
        return
    splits = _num_splits(scratch, lora, num_rows, num_inputs)
    assert splits * num_rows * scratch.width <= len(scratch.hidden), "the scratch is for fewer rows"
    num_projections = projections.stop - projections.start
    assert num_projections <= _MOST_PROJECTIONS
    block_r = triton.next_power_of_2(16 * num_projections)  # adapters of rank 16 or less usually take one round
    tables = bank.tables
    _shrink_kernel[(splits, num_segments)](
        x_TK,
        scratch.hidden,
        lora.segment_starts_X,
        lora.segment_counts_X,
        lora.segment_slots_X,
        bank.numbers_SF,
        bank.numbers_SF.stride(0),
        tables.ranks_SLP,
        tables.a_offsets_SLP,
        tables.ranks_SLP.stride(0),
        layer * tables.ranks_SLP.stride(1) + projections.start,
        num_inputs,
        triton.cdiv(triton.cdiv(num_inputs, _BLOCK_K), splits) * _BLOCK_K,
        WIDTH=scratch.width,
        NUM_PROJECTIONS=num_projections,
        ALIGNMENT=bank.alignment,
        ROWS=lora.segment_rows,
        BLOCK_R=block_r,
        BLOCK_K=_BLOCK_K,
        num_warps=2 if block_r == 16 else 4,  # more would read the same shared memory twice
        num_stages=4 if block_r == 16 else 3,
    )


def expand(
    scratch: LoraScratch,
    out_TN: torch.Tensor,
    lora: LoraRows,
    bank: LoraBank,
    layer: int,
    projections: slice,
    *,
    adds: bool = True,
    has_factors: bool = False,
    bias_N: torch.Tensor | None = None,
) -> None:
    """out += scale · B (A x) for each row in a segment, after `shrink` of the same rows, layer and projections.

    Args:
        out_TN: contiguous, in the bank's dtype; the outputs of adjacent projections.
        adds: False: overwrite these rows of out instead of adding to them.
        has_factors: also add scale · d ⊙ (out - bias), where an adapter has DoRA; out must be the product W x + bias.
    """
    assert adds or not has_factors, "DoRA changes the product itself"
    num_rows, num_outputs = out_TN.shape
    num_segments = len(lora.segment_starts_X)
    shapes = bank.projections.shapes[layer][projections]
    widths = [out for out, _ in shapes]
    assert out_TN.is_contiguous() and out_TN.dtype == bank.dtype and sum(widths) == num_outputs
    tables = bank.tables
    if not num_segments:
        return
    block_n = _BLOCK_N if lora.segment_rows == SEGMENT_ROWS else _BLOCK_N // 2
    _expand_kernel[(sum(triton.cdiv(width, block_n) for width in widths), num_segments)](
        scratch.hidden,
        out_TN,
        lora.segment_starts_X,
        lora.segment_counts_X,
        lora.segment_slots_X,
        lora.scales_T,
        bank.numbers_SF,
        bank.numbers_SF.stride(0),
        tables.ranks_SLP,
        tables.b_offsets_SLP,
        tables.d_offsets_SLP,
        bias_N,
        tables.ranks_SLP.stride(0),
        layer * tables.ranks_SLP.stride(1) + projections.start,
        *widths,
        *[0] * (_MOST_PROJECTIONS - len(widths)),
        num_outputs,
        WIDTH=scratch.width,
        SPLITS=_num_splits(scratch, lora, num_rows, bank.projections.input_width(layer, projections)),
        ALIGNMENT=bank.alignment,
        ROWS=lora.segment_rows,
        BLOCK_R=_BLOCK_R,
        BLOCK_N=block_n,
        ADDS=adds,
        HAS_FACTORS=has_factors,
        num_warps=4,
        num_stages=1,  # usually one round
        **overlapping(out_TN.device),
    )


# `place`: index of a layer's first projection in a slot's tables. It is the only argument that differs between layers,
# so kernels must not be specialised on its value.


@triton.jit(do_not_specialize=["place"])
def _shrink_kernel(
    x, hidden, starts, counts, slots, numbers, slot_stride, ranks, a_offsets, table_stride, place, num_inputs,
    inputs_per_split, WIDTH: tl.constexpr, NUM_PROJECTIONS: tl.constexpr, ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    split, segment = tl.program_id(0), tl.program_id(1)
    count = tl.load(counts + segment)
    if count == 0:
        return
    slot = tl.load(slots + segment).to(tl.int64)
    t = tl.arange(0, ROWS)
    inside_t = t < count
    row = (tl.load(starts + segment) + t).to(tl.int64)
    # The A's are stacked and read as one matrix.
    table = slot * table_stride + place
    p = tl.arange(0, 4)
    num_ranks = tl.sum(tl.load(ranks + table + p, mask=p < NUM_PROJECTIONS, other=0)).to(tl.int32)
    # Without this hint the loaded offset would count as unaligned, and reads would take two bytes at a time.
    offset = tl.load(a_offsets + table) // ALIGNMENT * ALIGNMENT
    a_numbers = numbers + slot * slot_stride + offset
    begin = split * inputs_per_split
    end = tl.minimum(begin + inputs_per_split, num_inputs)
    for first_rank in range(0, num_ranks, BLOCK_R):
        r = first_rank + tl.arange(0, BLOCK_R)
        inside_r = r < num_ranks
        total = tl.zeros([ROWS, BLOCK_R], tl.float32)
        for first_input in range(begin, end, BLOCK_K):
            k = first_input + tl.arange(0, BLOCK_K)
            inside_k = k < num_inputs
            v = tl.load(
                x + row[:, None] * num_inputs + k[None, :], mask=inside_t[:, None] & inside_k[None, :], other=0.0
            )
            a = tl.load(
                a_numbers + r.to(tl.int64)[:, None] * num_inputs + k[None, :],
                mask=inside_r[:, None] & inside_k[None, :],
                other=0.0,
            )
            total = tl.dot(v, tl.trans(a), total, input_precision="ieee")
        tl.store(
            hidden + (row[:, None] * tl.num_programs(0) + split) * WIDTH + r[None, :],
            total,
            mask=inside_t[:, None] & inside_r[None, :],
        )


@triton.jit(do_not_specialize=["place"])
def _expand_kernel(
    hidden, out, starts, counts, slots, scales, numbers, slot_stride, ranks, b_offsets, d_offsets, bias, table_stride,
    place, width_0, width_1, width_2, num_outputs, WIDTH: tl.constexpr, SPLITS: tl.constexpr, ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, ADDS: tl.constexpr, HAS_FACTORS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPS)
    tile, segment = tl.program_id(0), tl.program_id(1)
    count = tl.load(counts + segment)
    if count == 0:
        return
    slot = tl.load(slots + segment).to(tl.int64)
    # The projections' tiles are consecutive; no tile covers two projections.
    second = tl.cdiv(width_0, BLOCK_N)
    third = second + tl.cdiv(width_1, BLOCK_N)
    projection = (tile >= second).to(tl.int32) + (tile >= third).to(tl.int32)
    outputs = tl.where(projection == 0, width_0, tl.where(projection == 1, width_1, width_2))
    first_column = tl.where(projection == 0, 0, tl.where(projection == 1, width_0, width_0 + width_1))
    first_tile = tl.where(projection == 0, 0, tl.where(projection == 1, second, third))
    table = slot * table_stride + place
    rank = tl.load(ranks + table + projection).to(tl.int32)
    if ADDS and rank == 0:
        return
    p = tl.arange(0, 4)
    ranks_before = tl.sum(tl.load(ranks + table + p, mask=p < projection, other=0)).to(tl.int32)
    offset = tl.load(b_offsets + table + projection) // ALIGNMENT * ALIGNMENT  # as in `_shrink_kernel`
    b_numbers = numbers + slot * slot_stride + offset
    t = tl.arange(0, ROWS)
    inside_t = t < count
    row = (tl.load(starts + segment) + t).to(tl.int64)
    n = (tile - first_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = n < outputs
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for first_rank in range(0, rank, BLOCK_R):
        r = first_rank + tl.arange(0, BLOCK_R)
        inside_r = r < rank
        b = tl.load(
            b_numbers + r.to(tl.int64)[:, None] * outputs + n[None, :],
            mask=inside_r[:, None] & inside_n[None, :],
            other=0.0,
        )
        h = tl.zeros([ROWS, BLOCK_R], tl.float32)
        for split in tl.static_range(SPLITS):
            h += tl.load(
                hidden + row[:, None] * (SPLITS * WIDTH) + (ranks_before + r)[None, :] + split * WIDTH,
                mask=inside_t[:, None] & inside_r[None, :],
                other=0.0,
            )
        total = tl.dot(h.to(b.dtype), b, total, input_precision="ieee")
    scale = tl.load(scales + row, mask=inside_t, other=0.0)
    place_out = out + row[:, None] * num_outputs + (first_column + n)[None, :]
    inside = inside_t[:, None] & inside_n[None, :]
    if ADDS:
        product = tl.load(place_out, mask=inside, other=0.0).to(tl.float32)
        if HAS_FACTORS:
            d_offset = tl.load(d_offsets + table + projection)
            d = tl.load(numbers + slot * slot_stride + d_offset + n, mask=inside_n & (d_offset >= 0), other=0.0)
            change = d.to(tl.float32)[None, :] * product
            if bias is not None:
                b_n = tl.load(bias + first_column + n, mask=inside_n, other=0.0).to(tl.float32)
                change -= (d.to(tl.float32) * b_n)[None, :]
            total += change
        # Fused in every kernel, as compilers may or may not: without factors, the bits are those with factors of 0.
        total = tl.fma(scale[:, None], total, product)
    else:
        total *= scale[:, None]
    tl.store(place_out, total.to(out.dtype.element_ty), mask=inside)
