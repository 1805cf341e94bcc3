"""The addends of adapters to packed products, on the CPU: scale · (d ⊙ W x + Bᵀ(A x)), row by row.

In decoding, the cost is reading an adapter's numbers once for each of its tokens. So a thread computes whole tokens,
ordered by adapter, and needs no barrier between A and B.
"""

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from stellarbyte.forward_batch import ForwardBatch
from stellarbyte.lora.bank import LoraBank
from stellarbyte.ops.cpu import FAST_MATH, KEEP_COMPILED
from stellarbyte.ops.cpu.attention import Floats, Integers

# T tokens, J tokens with an adapter, S slots, L layers, P projections, F numbers of a slot

_HALF_PANEL = 8
_RANKS_AT_ONCE = 4


class Adapters(NamedTuple):
    """A bank's memory and tables, and the slots of a step's tokens."""

    max_rank: int
    numbers_SF: Floats
    ranks_SLP: Integers
    a_offsets_SLP: Integers
    b_offsets_SLP: Integers
    d_offsets_SLP: Integers  # -1: no DoRA
    has_dora: bool  # of the step's adapters
    tokens_J: Integers  # ordered by slot
    slots_J: Integers
    scales_J: Floats


def no_adapters(bank: LoraBank) -> Adapters:
    nobody = np.zeros(0, np.int64)
    return _adapters(bank, nobody, nobody, np.zeros(0, np.float32))


def adapters_of(batch: ForwardBatch, bank: LoraBank) -> Adapters:
    if not any(batch.adapter_slots):
        return no_adapters(bank)
    starts = np.array(batch.query_starts, dtype=np.int64)
    lengths_N = starts[1:] - starts[:-1]
    slots_T = np.repeat(np.array(batch.adapter_slots, dtype=np.int64), lengths_N)
    scales_T = np.repeat(np.array(batch.adapter_scales, dtype=np.float32), lengths_N)
    for start, num_plain in zip(starts, batch.num_plain, strict=False):
        slots_T[start : start + num_plain] = 0
    tokens_J = np.argsort(slots_T, kind="stable")[np.count_nonzero(slots_T == 0) :]
    return _adapters(bank, tokens_J, slots_T[tokens_J], scales_T[tokens_J])


def _adapters(bank: LoraBank, tokens_J: Integers, slots_J: Integers, scales_J: Floats) -> Adapters:
    return Adapters(
        max_rank=bank.max_rank,
        numbers_SF=bank.numbers_SF.numpy(),
        ranks_SLP=bank.ranks_SLP,
        a_offsets_SLP=bank.a_offsets_SLP,
        b_offsets_SLP=bank.b_offsets_SLP,
        d_offsets_SLP=bank.d_offsets_SLP,
        has_dora=bool((bank.d_offsets_SLP[np.unique(slots_J)] >= 0).any()),
        tokens_J=tokens_J,
        slots_J=slots_J,
        scales_J=scales_J,
    )


@njit(inline="always")
def _shrink(row, a_LK, hidden, scale):
    """hidden = scale · A row"""
    for r in range(len(a_LK)):
        total = np.float32(0.0)
        weights = a_LK[r]
        for c in range(len(row)):
            total += weights[c] * row[c]
        hidden[r] = total * scale


@njit(inline="always")
def _expand(hidden, b_RN, out):
    """out += Bᵀ hidden; four ranks at a time, to write `out` less often."""
    rank, width = b_RN.shape
    whole = rank - rank % _RANKS_AT_ONCE
    for r in range(0, whole, _RANKS_AT_ONCE):
        h0, h1, h2, h3 = hidden[r], hidden[r + 1], hidden[r + 2], hidden[r + 3]
        b0, b1, b2, b3 = b_RN[r], b_RN[r + 1], b_RN[r + 2], b_RN[r + 3]
        for n in range(width):
            out[n] += h0 * b0[n] + h1 * b1[n] + h2 * b2[n] + h3 * b3[n]
    for r in range(whole, rank):
        h0, b0 = hidden[r], b_RN[r]
        for n in range(width):
            out[n] += h0 * b0[n]


@njit(inline="always")
def _interleave(values, half, out):
    """Write values in the order of the rows of gates (half 0) or ups (half 1) of `interleave_gated`."""
    for n in range(len(values)):
        out[n // _HALF_PANEL * 2 * _HALF_PANEL + half * _HALF_PANEL + n % _HALF_PANEL] = values[n]


@njit(parallel=True, fastmath=FAST_MATH, nogil=True, cache=KEEP_COMPILED)
def write_addends(x, adapters, layer, first, widths, is_gated, addend, num_threads):
    """addend[t] = the token's adapter's addend to the projections `first`, `first` + 1 ..., which share the input x.

    Args:
        x: [T, K].
        widths: rows of each projection.
        is_gated: the two projections' rows are in the order of `interleave_gated`; otherwise consecutive.
        addend: [T, P · R], as in `linear`; rows of tokens without an adapter do not change.
    """
    num_tokens = len(adapters.tokens_J)
    for thread in prange(num_threads):
        hidden = np.empty(adapters.max_rank, np.float32)
        gated = np.empty(widths[0] if is_gated else 0, np.float32)
        for j in range(thread * num_tokens // num_threads, (thread + 1) * num_tokens // num_threads):
            token, slot = adapters.tokens_J[j], adapters.slots_J[j]
            numbers = adapters.numbers_SF[slot]
            out = addend[token]
            out[:] = np.float32(0.0)
            column = 0
            for i in range(len(widths)):
                rank = adapters.ranks_SLP[slot, layer, first + i]
                a_start = adapters.a_offsets_SLP[slot, layer, first + i]
                b_start = adapters.b_offsets_SLP[slot, layer, first + i]
                a = numbers[a_start : a_start + rank * x.shape[1]].reshape(rank, x.shape[1])
                b = numbers[b_start : b_start + rank * widths[i]].reshape(rank, widths[i])
                _shrink(x[token], a, hidden, adapters.scales_J[j])
                if is_gated:
                    gated[:] = np.float32(0.0)
                    _expand(hidden, b, gated)
                    _interleave(gated, i, out)
                else:
                    _expand(hidden, b, out[column : column + widths[i]])
                column += widths[i]


@njit(parallel=True, fastmath=FAST_MATH, nogil=True, cache=KEEP_COMPILED)
def add_rescaled(products, adapters, layer, first, widths, is_gated, addend, num_threads):
    """addend[t] += scale · d ⊙ W x for tokens whose adapter has DoRA; the arguments are those of `write_addends`.

    Args:
        products: [J, P · R] W x of the tokens with an adapter, without bias, in the addend's order.
    """
    num_tokens = len(adapters.tokens_J)
    for thread in prange(num_threads):
        for j in range(thread * num_tokens // num_threads, (thread + 1) * num_tokens // num_threads):
            slot, scale, out = adapters.slots_J[j], adapters.scales_J[j], addend[adapters.tokens_J[j]]
            column = 0
            for i in range(len(widths)):
                start = adapters.d_offsets_SLP[slot, layer, first + i]
                if start >= 0:
                    d = adapters.numbers_SF[slot, start : start + widths[i]]
                    for n in range(widths[i]):
                        place = column + n
                        if is_gated:
                            place = n // _HALF_PANEL * 2 * _HALF_PANEL + i * _HALF_PANEL + n % _HALF_PANEL
                        out[place] += scale * d[n] * products[j, place]
                column += widths[i]
