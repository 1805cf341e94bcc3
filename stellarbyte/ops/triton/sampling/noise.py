"""Gumbel noise from counters, for kernels: the numbers of `sampling/sampler.py`, up to rounding."""

import math

import triton
import triton.language as tl

# The interpreter does not run PTX; its logarithms are exact up to rounding.
_HAS_HARDWARE_LOG = tl.constexpr(not triton.knobs.runtime.interpret)
_LN_2 = tl.constexpr(math.log(2))
_LOG_LOG2_E = tl.constexpr(-math.log(math.log(2)))  # log of log2(e)


@triton.jit
def row_keys(state_low, state_high, position):
    """The two 32-bit keys of a row, uint32, from `sampler.choice_state` and the position; all int32."""
    low, high = state_low.to(tl.uint32, bitcast=True), state_high.to(tl.uint32, bitcast=True)
    x = ((high.to(tl.uint64) << 32) | low.to(tl.uint64)) ^ position.to(tl.uint64)
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def gumbel_noise(token_ids, key, second_key):
    """Standard Gumbel numbers, float32, of the shape of the int32 ids. The random bits are those of
    `sampling/sampler.py`."""
    return gumbel_of_bits(_mix32(_mix32(token_ids.to(tl.uint32, bitcast=True) ^ key) ^ second_key))


@triton.jit
def gumbel_of_bits(bits):
    """-log(-log1p(-u)) of the uniform number u of 32 random bits, within 1e-5.

    The error of a hardware logarithm is up to 2^-22, or 2^-22 of the result where that is larger. That is enough for
    the outer logarithm, and for the inner one unless u is small; there a polynomial (minimax of -log2(1 - u) / u on [0,
    1/8], off by 5e-7 of it) is precise for small exponentials, which win.
    """
    uniform = bits.to(tl.float32) * 2.0**-32 + 2.0**-33
    rest = tl.maximum(1.0 - uniform, 2.0**-24)  # u must not round to 1
    small = (((0.44489260 * uniform + 0.47398698) * uniform + 0.72152446) * uniform + 1.44269434) * uniform
    exponential = tl.where(uniform < 0.125, small, -_log2(rest))  # in units of ln 2
    return _log2(exponential) * -_LN_2 + _LOG_LOG2_E


@triton.jit
def _log2(x):
    """log2 of positive normal numbers: one instruction on a GPU, while `tl.log2` takes about twenty."""
    if _HAS_HARDWARE_LOG:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)
