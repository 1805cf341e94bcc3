"""Codes of 4 bits as numbers, in registers."""

import triton
import triton.language as tl

_HAS_PTX = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def unpack_tile(codes, zeros, ELEMENT: tl.constexpr):
    """The low and the high half of bytes, less `zeros` (0..15, of a shape that broadcasts), exact in ELEMENT.

    In bfloat16, bytes become the last mantissa bits of 128 + code, two numbers in an instruction.
    """
    if _HAS_PTX and ELEMENT == tl.bfloat16:
        offsets, _ = tl.broadcast((-128.0 - zeros.to(tl.float32)).to(tl.bfloat16), codes)
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, one;
            mov.b32 one, 0x3F803F80;
            and.b32 low, $4, 0x0F0F0F0F;
            shr.u32 high, $4, 4;
            and.b32 high, high, 0x0F0F0F0F;
            prmt.b32 $0, low, 0x43434343, 0x4140;
            prmt.b32 $1, low, 0x43434343, 0x4342;
            prmt.b32 $2, high, 0x43434343, 0x4140;
            prmt.b32 $3, high, 0x43434343, 0x4342;
            fma.rn.bf16x2 $0, $0, one, $5;
            fma.rn.bf16x2 $1, $1, one, $6;
            fma.rn.bf16x2 $2, $2, one, $5;
            fma.rn.bf16x2 $3, $3, one, $6;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r,r", [codes, offsets], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return (codes & 15).to(ELEMENT) - zeros.to(ELEMENT), (codes >> 4).to(ELEMENT) - zeros.to(ELEMENT)


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
