"""Codes of 4 bits as numbers, in registers.

Triton 3.6 compiles what stands behind the return of a branch, too, and wants one type; so the others are in an else.
"""

import triton
import triton.language as tl

_HAS_PTX = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def group_scale(words, IS_HALF: tl.constexpr):
    """float32 scales of words of int4 groups; IS_HALF: they are float16."""
    if words.dtype == tl.int64:
        return words.to(tl.int32).to(tl.float32, bitcast=True)
    elif IS_HALF:
        return words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (words << 16).to(tl.float32, bitcast=True)


@triton.jit
def group_zero(words, IS_REAL: tl.constexpr):
    """Zero points of words of int4 groups: int32, or float32 if IS_REAL."""
    if words.dtype == tl.int64:
        zeros = (words >> 32).to(tl.int32)
    else:
        zeros = words >> 16
    return zeros.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) if IS_REAL else zeros


@triton.jit
def unpack_quarters(codes, low_zeros, high_zeros, ELEMENT: tl.constexpr):
    """The four codes of each int16, lowest bits first, in ELEMENT: two less `low_zeros`, two less `high_zeros`.

    Zeros are int32, and the results exact, or float32, of a shape that broadcasts. In bfloat16, the codes of two
    neighbours become the last mantissa bits of 128 + code at once; real zeros are rounded to it first.
    """
    if _HAS_PTX and ELEMENT == tl.bfloat16:
        first, second, third, fourth = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 second, third, fourth;
            shr.u32 second, $4, 4;
            shr.u32 third, $4, 8;
            shr.u32 fourth, $4, 12;
            lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $1, second, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $2, third, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $3, fourth, 0x000F000F, 0x43004300, 0xEA;
            }
            """,
            "=&r,=&r,=&r,=&r,r", [codes], (tl.bfloat16,) * 4, is_pure=True, pack=2,
        )  # fmt: skip
        return (
            _less(first, low_zeros), _less(second, low_zeros), _less(third, high_zeros), _less(fourth, high_zeros)
        )  # fmt: skip
    else:
        codes = codes.to(tl.int32)
        return (
            ((codes & 15) - low_zeros).to(ELEMENT), ((codes >> 4 & 15) - low_zeros).to(ELEMENT),
            ((codes >> 8 & 15) - high_zeros).to(ELEMENT), ((codes >> 12 & 15) - high_zeros).to(ELEMENT),
        )  # fmt: skip


@triton.jit
def _less(numbers, zeros):
    """bfloat16 numbers - 128 - zeros. Integers become the last mantissa bits of -128 - zero, which is exact."""
    if zeros.dtype == tl.float32:
        return (numbers + tl.full([], -128.0, tl.bfloat16)) - zeros.to(tl.bfloat16)
    else:
        return numbers + (zeros | -0x3D00).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def unpack_words(words):
    """The 8 codes of an int32, as 16 + code in float32: low halves of its bytes, then high halves.

    Bytes, (byte & 0x78) | 0x80, become the exponent's last bit and the first mantissa bits of a number from 16 to 31.
    """
    if _HAS_PTX:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high;
            shl.b32 low, $8, 3;
            lop3.b32 low, low, 0x78787878, 0x80808080, 0xEA;
            shr.u32 high, $8, 1;
            lop3.b32 high, high, 0x78787878, 0x80808080, 0xEA;
            prmt.b32 $0, low, 0x41000000, 0x7044;
            prmt.b32 $1, low, 0x41000000, 0x7144;
            prmt.b32 $2, low, 0x41000000, 0x7244;
            prmt.b32 $3, low, 0x41000000, 0x7344;
            prmt.b32 $4, high, 0x41000000, 0x7044;
            prmt.b32 $5, high, 0x41000000, 0x7144;
            prmt.b32 $6, high, 0x41000000, 0x7244;
            prmt.b32 $7, high, 0x41000000, 0x7344;
            }
            """,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [words], (tl.float32,) * 8, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return (
            _code(words, 0), _code(words, 8), _code(words, 16), _code(words, 24),
            _code(words, 4), _code(words, 12), _code(words, 20), _code(words, 28),
        )  # fmt: skip


@triton.jit
def _code(words, SHIFT: tl.constexpr):
    return ((words >> SHIFT) & 15).to(tl.float32) + 16.0
