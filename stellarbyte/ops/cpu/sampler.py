"""Sampling of next tokens, compiled. Mathematics and order of steps are those of `sampling/sampler.py`."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numba import njit, prange

from stellarbyte.ops.cpu import KEEP_COMPILED
from stellarbyte.ops.cpu.instructions import exp
from stellarbyte.sampling.sampler import NO_TOKEN, RowSampling, row_key

# R rows, V vocabulary

_BLOCK = 256  # tokens whose noise is bounded together
_INFINITY_BITS = np.int32(0x7F800000)  # of a float32; NaN has larger bits, apart from the sign
_SIGNLESS = np.int32(0x7FFFFFFF)
_BINS = 1024  # of distances from the largest logit
_ROUNDING = {"nnan", "nsz", "reassoc", "contract"}  # flags of fast arithmetic that allow infinities


def sample(logits_RV: torch.Tensor, rows: Sequence[RowSampling], num_threads: int) -> list[int]:
    """One token id for each row of float32 logits, NO_TOKEN as in `sampling.sampler.sample`."""
    logits = logits_RV.numpy()
    least_R = np.array([_least_of_top_k(logits_V, row) for logits_V, row in zip(logits, rows, strict=True)], np.float32)
    parameters_R3 = np.array([(row.temperature, row.top_p, row.min_p) for row in rows], np.float32)
    keys_R2 = np.array([row_key(row) if row.temperature > 0 else (0, 0) for row in rows], np.uint32)
    tokens_R = np.empty(len(rows), np.int64)
    _sample_rows(logits, logits.view(np.int32), least_R, parameters_R3, keys_R2, tokens_R, num_threads)
    return tokens_R.tolist()


def _least_of_top_k(logits_V: np.ndarray, row: RowSampling) -> float:
    """The k-th largest logit; smaller ones are dropped."""
    if row.temperature == 0 or not 0 < row.top_k < len(logits_V):
        return -math.inf
    place = len(logits_V) - row.top_k
    return float(np.partition(logits_V, place)[place])


@njit(parallel=True, fastmath=_ROUNDING, nogil=True, cache=KEEP_COMPILED)
def _sample_rows(logits_RV, bits_RV, least_R, parameters_R3, keys_R2, tokens_R, num_threads):
    for thread in prange(num_threads):
        scaled_V = np.empty(logits_RV.shape[1], np.float32)
        for r in range(thread, len(logits_RV), num_threads):
            temperature, top_p, min_p = parameters_R3[r]
            likeliest = _first_argmax(logits_RV[r], bits_RV[r])
            if likeliest == NO_TOKEN:
                tokens_R[r] = NO_TOKEN
                continue
            if temperature > 0:
                largest = logits_RV[r, likeliest]
                least = least_R[r]
                for v in range(len(scaled_V)):
                    logit = logits_RV[r, v]
                    scaled_V[v] = (logit - largest) / temperature if logit >= least else np.float32(-np.inf)
                if top_p < 1:
                    _keep_top_p(scaled_V, top_p, likeliest)
                if min_p > 0:
                    for v in range(len(scaled_V)):
                        if exp(scaled_V[v]) < min_p:
                            scaled_V[v] = -np.inf
                likeliest = _draw(scaled_V, likeliest, keys_R2[r, 0], keys_R2[r, 1])
            tokens_R[r] = likeliest


@njit(inline="always")
def _first_argmax(logits_V, bits_V):
    """The likeliest token. NaN is detected in the bits: compiled arithmetic assumes that there is none."""
    largest, most_bits = logits_V[0], np.int32(0)
    for v in range(len(logits_V)):
        largest = max(largest, logits_V[v])
        most_bits = max(most_bits, bits_V[v] & _SIGNLESS)
    if most_bits > _INFINITY_BITS or abs(largest) == np.inf:
        return NO_TOKEN
    for v in range(len(logits_V)):
        if logits_V[v] == largest:
            return v
    return 0


@njit(inline="always")
def _keep_top_p(scaled_V, top_p, likeliest):
    """Set all but the likeliest tokens whose probabilities first add up to top_p to -inf; the largest number is 0.

    Ties with the last one stay. Tokens with a probability below (1 - top_p) / V add up to less than 1 - top_p, so none
    of them stays. The masses of the others, in bins by logit, determine the bin of the last one. Only that bin, small
    for any distribution, is sorted.
    """
    total = np.float32(0)
    for v in range(len(scaled_V)):
        total += exp(scaled_V[v])
    least = total * (1 - top_p) / len(scaled_V)
    candidates = np.empty(len(scaled_V), np.int64)
    count, lowest = 0, np.float32(0)
    for v in range(len(scaled_V)):
        if exp(scaled_V[v]) >= least:
            candidates[count] = v
            count += 1
            lowest = min(lowest, scaled_V[v])
    candidates = candidates[:count]
    numbers = scaled_V[candidates]
    bins = np.empty(count, np.int64)
    masses = np.zeros(_BINS)
    scale = _BINS / lowest if lowest < 0 else np.float32(0)
    for i in range(count):
        bins[i] = max(0, min(int(numbers[i] * scale), _BINS - 1))  # NaN may get any bin
        masses[bins[i]] += exp(numbers[i])
    before, last = np.float64(0), 0
    while last < _BINS - 1 and before + masses[last] < top_p * total:
        before += masses[last]
        last += 1
    scaled_V[:] = -np.inf
    scaled_V[likeliest] = 0
    for i in range(count):
        if bins[i] < last:
            scaled_V[candidates[i]] = numbers[i]
    inside = np.flatnonzero(bins == last)
    inside = inside[np.argsort(-numbers[inside], kind="mergesort")]
    edge = np.float32(0)
    for place in range(len(inside)):
        i = inside[place]
        if before >= top_p * total and numbers[i] < edge:
            break
        edge = numbers[i]
        scaled_V[candidates[i]] = numbers[i]
        before += exp(numbers[i])


@njit(inline="always")
def _draw(scaled_V, likeliest, key, second_key):
    """argmax of scaled_V + Gumbel noise. Computes logarithms only for tokens that the noise could make the winner."""
    winner, best = likeliest, scaled_V[likeliest] + _gumbel(_noise_bits(likeliest, key, second_key))
    bits = np.empty(_BLOCK, np.uint32)
    for start in range(0, len(scaled_V), _BLOCK):
        block = scaled_V[start : start + _BLOCK]
        least_bits = np.uint32(0xFFFFFFFF)  # smaller bits, larger noise
        largest = np.float32(-np.inf)
        for i in range(len(block)):
            bits[i] = _noise_bits(start + i, key, second_key)
            least_bits = min(least_bits, bits[i])
            largest = max(largest, block[i])
        most_noise = _gumbel(least_bits)
        if largest + most_noise < best:
            continue
        for i in range(len(block)):
            if block[i] + most_noise >= best:
                score = block[i] + _gumbel(bits[i])
                if score > best or (score == best and start + i < winner):
                    winner, best = start + i, score
    return winner


@njit(inline="always")
def _noise_bits(token, key, second_key):
    return _mix32(_mix32(np.uint32(token) ^ key) ^ second_key)


@njit(inline="always")
def _gumbel(bits):
    uniform = min((np.float32(bits) + np.float32(0.5)) * np.float32(2.0**-32), np.float32(1 - 2.0**-24))
    return -np.float32(math.log(-np.float32(math.log1p(-uniform))))


@njit(inline="always")
def _mix32(x):
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    x = np.uint32((x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(x ^ (x >> np.uint32(16)))
