"""Sampling of next tokens on the GPU, without the host. The reference is `sampling/sampler.py`.

A row's vocabulary is divided into parts, so that a single row also keeps the GPU busy.

1. `_parts_kernel` (row, part): the part's largest logit; for rows without truncation also its winner, with scores
   relative to that logit, since the row's largest is not known yet.
2. `count_kernel` (row, part): histogram of the tokens' distances from the row's largest logit, and their mass.
3. `list_kernel` (row, part): puts the tokens that may stay by these counts, usually few, into the row's list.
4. `_choose_kernel` (row): the exact edges of top_k and top_p by bisection over the list, and the winner among the
   tokens inside; for rows without truncation the best of the parts' winners.

If more tokens may stay than a list holds (flat distributions), the bisection runs over the row itself: the same
function, slower by some passes over the row. Batches without truncation skip steps 2 and 3; in other batches, rows
without it return from them immediately.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from stellarbyte.ops.triton.overlap import overlapping, wait_for_inputs
from stellarbyte.ops.triton.sampling.noise import gumbel_noise, row_keys
from stellarbyte.ops.triton.sampling.truncation import (
    BINS,
    count_kernel,
    distance_below,
    draw_inside,
    is_truncated,
    last_bin,
    list_kernel,
    row_mass,
)
from stellarbyte.sampling.sampler import NO_TOKEN

# R rows, V vocabulary, P parts of it, N bins, L candidates

CAPACITY = 4096  # of a row's list
_PART = 2048
_LARGEST_INVERSE = tl.constexpr(2.0**127)  # of a temperature; inf · 0 would be NaN
_NO_TOKEN = tl.constexpr(NO_TOKEN)
_BLOCK = 8192  # tokens of a row that one program processes together


class SamplingRows(NamedTuple):
    """How each row is sampled: `RowSampling` on the device. Any strides: columns of one tensor are possible."""

    temperature_R: torch.Tensor  # float32; 0: greedy
    top_k_R: torch.Tensor  # int32; 0: all
    top_p_R: torch.Tensor  # float32
    min_p_R: torch.Tensor  # float32
    state_R2: torch.Tensor  # int32, low and high word of `sampler.choice_state`; adjacent words
    positions_R: torch.Tensor  # int32, tokens of the sequence before the new one


@dataclass(frozen=True, kw_only=True)
class SamplerScratch:
    """Intermediate results of the kernels, for batches of up to R rows. Calls on one stream may share it."""

    maxima_RP: torch.Tensor  # float32
    winners_RP: torch.Tensor  # int32, token ids; rows without truncation
    scores_RP: torch.Tensor  # float32, the winners' scores counted from the part's maximum
    masses_RP: torch.Tensor  # int64, of probability, in units; rows with truncation
    lowest_RP: torch.Tensor  # float32, the smallest candidate logit
    counts_RN: torch.Tensor  # int32, tokens in each bin of distance
    lengths_R: torch.Tensor  # int32, of the lists
    logits_RL: torch.Tensor  # float32, the lists
    ids_RL: torch.Tensor  # int32

    @classmethod
    def make(
        cls, max_rows: int, vocab_size: int, device: torch.device, *, capacity: int = CAPACITY
    ) -> "SamplerScratch":
        parts = triton.cdiv(vocab_size, _PART)

        def empty(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(max_rows, width, dtype=dtype, device=device)

        return cls(
            maxima_RP=empty(parts, torch.float32),
            winners_RP=empty(parts, torch.int32),
            scores_RP=empty(parts, torch.float32),
            masses_RP=empty(parts, torch.int64),
            lowest_RP=empty(parts, torch.float32),
            counts_RN=empty(BINS.value, torch.int32),
            lengths_R=torch.empty(max_rows, dtype=torch.int32, device=device),
            logits_RL=empty(capacity, torch.float32),
            ids_RL=empty(capacity, torch.int32),
        )


def sample(
    logits_RV: torch.Tensor, rows: SamplingRows, out_R: torch.Tensor, scratch: SamplerScratch, *, truncates: bool
) -> None:
    """Write one token id for each row to `out_R`, int32 contiguous; for CUDA graphs.

    Args:
        logits_RV: bfloat16 or float32, rows contiguous; -inf forbids a token. A row with NaN, +inf or nothing but -inf
            gets NO_TOKEN. The logits do not change.
        scratch: of this vocabulary, for at least R rows.
        truncates: any row may have top_k, top_p or min_p; if False these are ignored.
    """
    num_rows, vocab_size = logits_RV.shape
    num_parts = scratch.maxima_RP.shape[1]
    assert logits_RV.stride(1) == 1 and num_parts == triton.cdiv(vocab_size, _PART)
    source = (logits_RV, logits_RV.stride(0), vocab_size)
    limits = [x for column in rows[:4] for x in (column, column.stride(0))]
    noise = [x for column in rows[4:] for x in (column, column.stride(0))]
    capacity = scratch.ids_RL.shape[1]
    parts = triton.next_power_of_2(num_parts)
    grid = (num_rows, num_parts)
    overlaps = overlapping(logits_RV.device)
    _parts_kernel[grid](
        *source, *limits, *noise, scratch.maxima_RP, scratch.winners_RP, scratch.scores_RP, scratch.counts_RN,
        scratch.lengths_R, num_parts, TRUNCATES=truncates, PART=_PART, **overlaps,
    )  # fmt: skip
    if truncates:
        count_kernel[grid](
            *source, *limits, scratch.maxima_RP, scratch.counts_RN, scratch.masses_RP, num_parts,
            PART=_PART, PARTS=parts, **overlaps,
        )  # fmt: skip
        list_kernel[grid](
            *source, *limits, scratch.maxima_RP, scratch.counts_RN, scratch.masses_RP, scratch.lowest_RP,
            scratch.lengths_R, scratch.logits_RL, scratch.ids_RL, num_parts, capacity,
            PART=_PART, PARTS=parts, **overlaps,
        )  # fmt: skip
    _choose_kernel[(num_rows,)](
        *source, *limits, *noise, scratch.maxima_RP, scratch.winners_RP, scratch.scores_RP, scratch.masses_RP,
        scratch.lowest_RP, scratch.counts_RN, scratch.logits_RL, scratch.ids_RL, out_R, num_parts, capacity,
        TRUNCATES=truncates, PARTS=parts, LIST_BLOCK=min(CAPACITY, triton.next_power_of_2(capacity)),
        ROW_BLOCK=min(_BLOCK, triton.next_power_of_2(vocab_size)),
        KEY_SHIFT=16 if logits_RV.dtype == torch.bfloat16 else 0, num_warps=16 if truncates else 4, **overlaps,
    )  # fmt: skip


@triton.jit
def _parts_kernel(
    logits, logits_stride, vocab_size, temperatures, temperature_stride, top_ks, top_k_stride, top_ps, top_p_stride,
    min_ps, min_p_stride, states, state_stride, positions, position_stride, maxima, winners, scores, counts, lengths,
    num_parts, TRUNCATES: tl.constexpr, PART: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPS)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = part * PART + tl.arange(0, PART)
    x = tl.load(logits + row * logits_stride + token, mask=token < vocab_size, other=-float("inf")).to(tl.float32)
    x = tl.where(x == x, x, float("inf"))  # a maximum would ignore NaN; as +inf it invalidates the row
    largest = tl.max(x, axis=0)
    tl.store(maxima + row * num_parts + part, largest)
    temperature = tl.load(temperatures + row * temperature_stride)
    draws = temperature > 0
    if TRUNCATES:
        top_k, top_p = tl.load(top_ks + row * top_k_stride), tl.load(top_ps + row * top_p_stride)
        min_p = tl.load(min_ps + row * min_p_stride)
        draws = draws & (is_truncated(temperature, top_k, top_p, min_p, vocab_size) == 0)
        if part == 0:
            tl.store(counts + row * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
            tl.store(lengths + row, 0)
    score, top = x, largest
    if draws:
        state = states + row * state_stride
        position = tl.load(positions + row * position_stride)
        key, second_key = row_keys(tl.load(state), tl.load(state + 1), position)
        # If the whole part is forbidden, or a logit is infinite, inf - inf would be NaN.
        finite = tl.where(tl.abs(largest) == float("inf"), 0.0, largest)
        # Up to rounding the distance from the largest, without a division for each token.
        score = (x - finite) * tl.minimum(1 / temperature, _LARGEST_INVERSE) + gumbel_noise(token, key, second_key)
        top = tl.max(score, axis=0)
        tl.store(scores + row * num_parts + part, top)
    # Finding the maximum first and then its index takes half the instructions of carrying indices along.
    tl.store(winners + row * num_parts + part, tl.min(tl.where(score == top, token, 0x7FFFFFFF), axis=0))


@triton.jit
def _choose_kernel(
    logits, logits_stride, vocab_size, temperatures, temperature_stride, top_ks, top_k_stride, top_ps, top_p_stride,
    min_ps, min_p_stride, states, state_stride, positions, position_stride, maxima, winners, scores, masses, lowest,
    counts, listed_logits, listed_ids, out, num_parts, capacity, TRUNCATES: tl.constexpr, PARTS: tl.constexpr,
    LIST_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, KEY_SHIFT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    inside = part < num_parts
    temperature = tl.load(temperatures + row * temperature_stride)
    score = tl.load(maxima + row * num_parts + part, mask=inside, other=-float("inf"))
    largest = tl.max(score, axis=0)
    if temperature > 0:
        below = distance_below(score, tl.where(tl.abs(largest) == float("inf"), 0.0, largest), temperature)
        score = tl.load(scores + row * num_parts + part, mask=inside, other=0.0) - below
    best_part = tl.minimum(tl.argmax(score, axis=0), num_parts - 1)  # arbitrary for NaNs of an invalid row
    winner = tl.load(winners + row * num_parts + best_part)
    if TRUNCATES:
        top_k, top_p = tl.load(top_ks + row * top_k_stride), tl.load(top_ps + row * top_p_stride)
        min_p = tl.load(min_ps + row * min_p_stride)
        if is_truncated(temperature, top_k, top_p, min_p, vocab_size):
            state = states + row * state_stride
            position = tl.load(positions + row * position_stride)
            key, second_key = row_keys(tl.load(state), tl.load(state + 1), position)
            mass = row_mass(masses, row, num_parts, PARTS)
            least = tl.min(tl.load(lowest + row * num_parts + part, mask=inside, other=float("inf")), axis=0)
            _, length = last_bin(counts, row, mass, top_k, top_p, min_p, vocab_size)
            top_k = tl.where(top_k < vocab_size, top_k, 0)
            if length <= capacity:
                listed = row * capacity
                winner = draw_inside(
                    listed_logits + listed, listed_ids + listed, length, largest, least, mass, temperature, top_k,
                    top_p, min_p, key, second_key, True, KEY_SHIFT, LIST_BLOCK,
                )  # fmt: skip
            else:
                winner = draw_inside(
                    logits + row * logits_stride, listed_ids, vocab_size, largest, least, mass, temperature, top_k,
                    top_p, min_p, key, second_key, False, KEY_SHIFT, ROW_BLOCK,
                )  # fmt: skip
    tl.store(out + row, tl.where(tl.abs(largest) < float("inf"), tl.minimum(winner, vocab_size - 1), _NO_TOKEN))
