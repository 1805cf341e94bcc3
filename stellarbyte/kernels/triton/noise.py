"""Gumbel noise from counters, inside kernels: bit for bit the generator of `sampling.py`. Knows no logits."""

import triton
import triton.language as tl


@triton.jit
def row_keys(state_low, state_high, position):
    """The two 32-bit keys of a row, uint32, from `sampling.choice_state` and the position; all int32."""
    low, high = state_low.to(tl.uint32, bitcast=True), state_high.to(tl.uint32, bitcast=True)
    x = ((high.to(tl.uint64) << 32) | low.to(tl.uint64)) ^ position.to(tl.uint64)
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def gumbel_noise(token_ids, key, second_key):
    """Standard Gumbel numbers, float32, of the shape of the int32 ids.

    log1p(-u) is log(w) · u / (1 - w) with w = 1 - u rounded, which undoes the rounding (Kahan); so it takes a logarithm
    that is right near 1, as tl.log is, and no log1p, which Triton's interpreter lacks.
    """
    bits = _mix32(_mix32(token_ids.to(tl.uint32, bitcast=True) ^ key) ^ second_key)
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    rest = 1.0 - uniform
    exact = rest == 1.0
    exponential = tl.where(exact, uniform, -tl.log(rest) * (uniform / tl.where(exact, 1.0, 1.0 - rest)))
    return -tl.log(exponential)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)
