"""Embeddings and output heads of adapters (modules_to_save), in steps on the GPU.

The bank holds what they differ from the model's, so a request's scale multiplies that, as the rest of an adapter. Each
has memory of its own; its place is read on the device, so that a captured launch serves any batch of its size.
"""

import torch
import triton
import triton.language as tl

from stellarbyte.lora.bank import EMBEDDING, HEAD, REPLACEABLE, LoraBank
from stellarbyte.ops.triton.lora import LoraRows
from stellarbyte.ops.triton.overlap import overlapping, wait_for_inputs

# T tokens, C hidden size, R rows of some of them, V vocabulary

_BLOCK_V = 64
_BLOCK_C = 128
_ALIGNMENT = tl.constexpr(8)  # numbers that divide where a matrix begins, wherever it was allocated


def add_embeddings(
    x_TC: torch.Tensor, tokens_T: torch.Tensor, rows: LoraRows, bank: LoraBank, multiplier: float
) -> None:
    """x += scale · multiplier · (the adapter's embedding less the model's), for rows whose adapter has one.

    Args:
        tokens_T: int32 or int64, of any stride.
        multiplier: of embeddings in this model.
    """
    num_segments, width = len(rows.segment_starts_X), x_TC.shape[1]
    assert x_TC.is_contiguous() and x_TC.dtype == bank.dtype
    if not num_segments:
        return
    _embedding_kernel[(rows.segment_rows, num_segments)](
        x_TC, tokens_T, tokens_T.stride(0), *rows[:4], bank.numbers_SF, bank.tables.replaced_offsets_S2,
        width, multiplier, PLACE=REPLACEABLE.index(EMBEDDING), BLOCK=triton.next_power_of_2(width),
        **overlapping(x_TC.device),
    )  # fmt: skip


def add_logits(logits_RV: torch.Tensor, hidden_RC: torch.Tensor, rows: LoraRows, bank: LoraBank) -> None:
    """logits += scale · (the adapter's head less the model's) · hidden, for rows whose adapter has a head.

    All contiguous, in the bank's dtype.
    """
    num_segments, vocab_size = len(rows.segment_starts_X), logits_RV.shape[1]
    assert logits_RV.is_contiguous() and hidden_RC.is_contiguous() and hidden_RC.dtype == bank.dtype
    if not num_segments:
        return
    _head_kernel[(triton.cdiv(vocab_size, _BLOCK_V), num_segments)](
        logits_RV, hidden_RC, *rows[:4], bank.numbers_SF, bank.tables.replaced_offsets_S2, vocab_size,
        hidden_RC.shape[1], PLACE=REPLACEABLE.index(HEAD), ROWS=max(16, rows.segment_rows), BLOCK_V=_BLOCK_V,
        BLOCK_C=_BLOCK_C, **overlapping(logits_RV.device),
    )  # fmt: skip


@triton.jit
def _embedding_kernel(
    x, tokens, token_stride, starts, counts, slots, scales, numbers, offsets, width, multiplier, PLACE: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One row of a segment."""
    wait_for_inputs(OVERLAPS)
    r, segment = tl.program_id(0), tl.program_id(1)
    offset = tl.load(offsets + tl.load(slots + segment) * 2 + PLACE)
    if (r >= tl.load(counts + segment)) | (offset == 0):
        return
    row = (tl.load(starts + segment) + r).to(tl.int64)
    token = tl.load(tokens + row * token_stride).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < width
    change = tl.load(numbers + offset // _ALIGNMENT * _ALIGNMENT + token * width + c, mask=inside, other=0.0)
    total = tl.load(x + row * width + c, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(scales + row) * multiplier * change.to(tl.float32)
    tl.store(x + row * width + c, total.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _head_kernel(
    logits, hidden, starts, counts, slots, scales, numbers, offsets, vocab_size, width, PLACE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Some logits of a segment's rows."""
    wait_for_inputs(OVERLAPS)
    segment = tl.program_id(1)
    count = tl.load(counts + segment)
    offset = tl.load(offsets + tl.load(slots + segment) * 2 + PLACE)
    if (count == 0) | (offset == 0):
        return
    change = numbers + offset // _ALIGNMENT * _ALIGNMENT
    t = tl.arange(0, ROWS)
    inside_t = t < count
    row = (tl.load(starts + segment) + t).to(tl.int64)
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside_v = v < vocab_size
    total = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for first in range(0, width, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside_c = c < width
        h = tl.load(hidden + row[:, None] * width + c[None, :], mask=inside_t[:, None] & inside_c[None, :], other=0.0)
        w = tl.load(
            change + v.to(tl.int64)[:, None] * width + c[None, :], mask=inside_v[:, None] & inside_c[None, :], other=0.0
        )
        total = tl.dot(h, tl.trans(w), total, input_precision="ieee")
    place = logits + row[:, None] * vocab_size + v[None, :]
    inside = inside_t[:, None] & inside_v[None, :]
    scale = tl.load(scales + row, mask=inside_t, other=0.0)
    total = tl.load(place, mask=inside, other=0.0).to(tl.float32) + scale[:, None] * total
    tl.store(place, total.to(logits.dtype.element_ty), mask=inside)
