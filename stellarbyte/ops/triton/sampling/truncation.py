"""Truncation by top_k, top_p and min_p without sorting the vocabulary: kernels of the sampler.

The criterion is the distance of a logit from the row's largest, at the row's temperature. Counts in 256 bins bound the
distance of the tokens that stay; tokens within this bound are listed, and a bisection over the list finds the exact
edge. Probability masses are summed as integers, so that the order of the list, which is arbitrary, does not matter.
"""

import triton
import triton.language as tl

from stellarbyte.ops.triton.overlap import wait_for_inputs
from stellarbyte.ops.triton.sampling.noise import gumbel_noise

BINS = tl.constexpr(256)  # 16 an octave of distances from 2^-10 to 2^6; the outer two include all beyond
_BIN_SHIFT = tl.constexpr(19)  # drops all but exponent and four bits of a float32
_FIRST_BIN = tl.constexpr((127 - 10) << 4)
_MASS_UNIT = tl.constexpr(2.0**38)  # of the largest logit's mass; 2^25 such tokens fit into an int64


@triton.jit
def is_truncated(temperature, top_k, top_p, min_p, vocab_size):
    return (temperature > 0) & (((top_k > 0) & (top_k < vocab_size)) | (top_p < 1) | (min_p > 0))


@triton.jit
def row_maximum(maxima, row, num_parts, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    return tl.max(tl.load(maxima + row * num_parts + part, mask=part < num_parts, other=-float("inf")), axis=0)


@triton.jit
def distance_below(x, largest, temperature):
    """The distance of a logit from the largest, at this temperature: ≥ 0, inf for a forbidden token."""
    return tl.div_rn(largest - x, temperature)


@triton.jit
def _mass(distance):
    return (tl.exp(-distance) * _MASS_UNIT).to(tl.int64)


@triton.jit
def _bin_of(distance):
    """The bin, from the float's bits, so that edges are exact."""
    return tl.minimum(tl.maximum((distance.to(tl.int32, bitcast=True) >> _BIN_SHIFT) - _FIRST_BIN, 0), BINS - 1)


@triton.jit
def last_bin(counts, row, total_mass, top_k, top_p, min_p, vocab_size):
    """The last bin that may contain a token that stays, and the number of tokens up to it.

    With top_k it is the bin of the k-th token, since top_p needs the mass of all k. Otherwise it excludes tokens below
    min_p, and those behind a bin if the tokens left, each as likely as its bin's near edge, add up to less than
    1 - top_p. The margins are far above the errors of float32 sums.
    """
    n = tl.arange(0, BINS)
    count = tl.load(counts + row * BINS + n)
    upto = tl.cumsum(count, axis=0)
    near_edge = tl.where(n == 0, 0, (n + _FIRST_BIN) << _BIN_SHIFT).to(tl.float32, bitcast=True)
    most = tl.exp(-near_edge)
    if (top_k > 0) & (top_k < vocab_size):
        last = tl.sum((upto < top_k).to(tl.int32), axis=0)
    else:
        last = BINS - 1
        left = tl.cumsum(count.to(tl.float32) * most, axis=0, reverse=True)
        allowed = (1 - top_p) * 0.999 * (total_mass.to(tl.float32) / _MASS_UNIT)
        last = tl.minimum(last, tl.sum((left > allowed).to(tl.int32), axis=0) - 1)
        last = tl.minimum(last, tl.sum((most >= min_p * 0.999).to(tl.int32), axis=0) - 1)
    last = tl.minimum(tl.maximum(last, 0), BINS - 1)
    return last, tl.sum(tl.where(n <= last, count, 0), axis=0)


@triton.jit
def count_kernel(
    logits, logits_stride, vocab_size, temperatures, temperature_stride, top_ks, top_k_stride, top_ps, top_p_stride,
    min_ps, min_p_stride, maxima, counts, masses, num_parts, PART: tl.constexpr, PARTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPS)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, top_k = tl.load(temperatures + row * temperature_stride), tl.load(top_ks + row * top_k_stride)
    top_p, min_p = tl.load(top_ps + row * top_p_stride), tl.load(min_ps + row * min_p_stride)
    if is_truncated(temperature, top_k, top_p, min_p, vocab_size):
        token = part * PART + tl.arange(0, PART)
        x = tl.load(logits + row * logits_stride + token, mask=token < vocab_size, other=-float("inf")).to(tl.float32)
        distance = distance_below(x, row_maximum(maxima, row, num_parts, PARTS), temperature)
        allowed = distance < float("inf")
        histogram = tl.histogram(_bin_of(distance), BINS, mask=allowed)
        tl.atomic_add(counts + row * BINS + tl.arange(0, BINS), histogram, mask=histogram > 0, sem="relaxed")
        tl.store(masses + row * num_parts + part, tl.sum(tl.where(allowed, _mass(distance), 0), axis=0))


@triton.jit
def list_kernel(
    logits, logits_stride, vocab_size, temperatures, temperature_stride, top_ks, top_k_stride, top_ps, top_p_stride,
    min_ps, min_p_stride, maxima, counts, masses, lowest, lengths, listed_logits, listed_ids, num_parts, capacity,
    PART: tl.constexpr, PARTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPS)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, top_k = tl.load(temperatures + row * temperature_stride), tl.load(top_ks + row * top_k_stride)
    top_p, min_p = tl.load(top_ps + row * top_p_stride), tl.load(min_ps + row * min_p_stride)
    if is_truncated(temperature, top_k, top_p, min_p, vocab_size):
        total_mass = row_mass(masses, row, num_parts, PARTS)
        last, length = last_bin(counts, row, total_mass, top_k, top_p, min_p, vocab_size)
        token = part * PART + tl.arange(0, PART)
        x = tl.load(logits + row * logits_stride + token, mask=token < vocab_size, other=-float("inf")).to(tl.float32)
        distance = distance_below(x, row_maximum(maxima, row, num_parts, PARTS), temperature)
        is_candidate = (distance < float("inf")) & (_bin_of(distance) <= last)
        tl.store(lowest + row * num_parts + part, tl.min(tl.where(is_candidate, x, float("inf")), axis=0))
        if length <= capacity:
            upto = tl.cumsum(is_candidate.to(tl.int32), axis=0)
            start = tl.atomic_add(lengths + row, tl.max(upto, axis=0), sem="relaxed")
            entry = row * capacity + start + upto - 1
            tl.store(listed_logits + entry, x, mask=is_candidate)
            tl.store(listed_ids + entry, token, mask=is_candidate)


@triton.jit
def row_mass(masses, row, num_parts, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(masses + row * num_parts + part, mask=part < num_parts, other=0), axis=0)


@triton.jit
def draw_inside(
    logits, ids, count, largest, least, mass, temperature, top_k, top_p, min_p, key, second_key,
    HAS_IDS: tl.constexpr, KEY_SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The winner of the tokens that stay, among `count` tokens of at least `least`; `mass` is the whole row's."""
    if top_k > 0:
        least = _edge(logits, count, least, largest, temperature, top_k.to(tl.int64), False, KEY_SHIFT, BLOCK)
    if top_p < 1:
        if top_k > 0:
            mass = _weight(logits, count, least, largest, temperature, True, BLOCK)
        needed = (top_p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64)
        least = _edge(logits, count, least, largest, temperature, needed, True, KEY_SHIFT, BLOCK)
    furthest = distance_below(least, largest, temperature)
    best, winner = -float("inf"), 0
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(logits + i, mask=i < count, other=-float("inf")).to(tl.float32)
        token = i
        if HAS_IDS:
            token = tl.load(ids + i, mask=i < count, other=0)
        distance = distance_below(x, largest, temperature)
        stays = (distance <= furthest) & (tl.exp(-distance) >= min_p)
        score = tl.where(stays, gumbel_noise(token, key, second_key) - distance, -float("inf"))
        top = tl.max(score, axis=0)
        first = tl.min(tl.where(score == top, token, 0x7FFFFFFF), axis=0)
        wins = (top > best) | ((top == best) & (first < winner))
        best, winner = tl.where(wins, top, best), tl.where(wins, first, winner)
    return winner


@triton.jit
def _edge(
    logits, count, least, largest, temperature, needed,
    BY_MASS: tl.constexpr, KEY_SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest threshold whose tokens reach the count, or mass, `needed`; `least` if there is none.

    Bisects integers in the order of the floats, few of them for bfloat16.
    """
    low, high = _key_of(least, KEY_SHIFT), _key_of(largest, KEY_SHIFT)
    while low < high:
        middle = (low + high + 1) >> 1
        weight = _weight(logits, count, _float_of(middle, KEY_SHIFT), largest, temperature, BY_MASS, BLOCK)
        enough = weight >= needed
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    return _float_of(low, KEY_SHIFT)


@triton.jit
def _weight(logits, count, least, largest, temperature, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Number or mass of the tokens of at least `least`, int64. Logits that are equal after scaling count together."""
    total = tl.zeros([BLOCK], tl.int64 if BY_MASS else tl.int32)
    furthest = distance_below(least, largest, temperature)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(logits + i, mask=i < count, other=-float("inf")).to(tl.float32)
        if BY_MASS:
            distance = distance_below(x, largest, temperature)
            total += tl.where(distance <= furthest, _mass(distance), 0)
        else:
            total += (x >= least).to(tl.int32)
    return tl.sum(total, axis=0).to(tl.int64)


@triton.jit
def _key_of(x, KEY_SHIFT: tl.constexpr):
    """A number's rank among the floats, int64; with a shift, among those of the upper bits."""
    bits = x.to(tl.int32, bitcast=True)
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> KEY_SHIFT).to(tl.int64)


@triton.jit
def _float_of(key, KEY_SHIFT: tl.constexpr):
    bits = (key << KEY_SHIFT).to(tl.int32)
    return tl.where(bits < 0, (bits | ((1 << KEY_SHIFT) - 1)) ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
