"""Vector instructions for the CPU kernels, where LLVM's vectoriser would not find them. Knows no matrices.

Vectors have 16 lanes of float32: two AVX2 registers, one of AVX-512, four of NEON; LLVM splits them as the machine has.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16

FLOAT, BYTE, INT32, INT64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
FLOATS, BYTES, INTS = (ir.VectorType(scalar, LANES) for scalar in (FLOAT, BYTE, INT32))


class Emitter:
    """Short names for the LLVM instructions that the kernels are made of."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder
        self._fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(FLOATS, [FLOATS] * 3), f"llvm.fma.v{LANES}f32"
        )

    def zeros(self) -> ir.Value:
        """A vector variable (LLVM keeps it in registers), 0 at first."""
        return cgutils.alloca_once_value(self.builder, ir.Constant(FLOATS, [0.0] * LANES))

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a · b + c"""
        return self.builder.call(self._fma, [a, b, c])

    def offset(self, pointer: ir.Value, index: ir.Value) -> ir.Value:
        return self.builder.gep(pointer, [index])

    def times(self, index: ir.Value, factor: int) -> ir.Value:
        return self.builder.mul(index, ir.Constant(INT64, factor))

    def load(self, pointer: ir.Value, kind: ir.Type, align: int) -> ir.Value:
        value = self.builder.load(self.builder.bitcast(pointer, kind.as_pointer()))
        value.align = align
        return value

    def store(self, values: ir.Value, pointer: ir.Value) -> None:
        self.builder.store(values, self.builder.bitcast(pointer, FLOATS.as_pointer())).align = 4

    def splat(self, scalar: ir.Value) -> ir.Value:
        vector = self.builder.insert_element(
            ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined), scalar, ir.Constant(INT32, 0)
        )
        return self.builder.shuffle_vector(vector, vector, ir.Constant(INTS, [0] * LANES))

    def total(self, vector: ir.Value) -> ir.Value:
        """The sum of a vector's lanes."""
        width = LANES
        while width > 1:
            width //= 2
            low, high = (
                self.builder.shuffle_vector(
                    vector, vector, ir.Constant(ir.VectorType(INT32, width), list(range(first, first + width)))
                )
                for first in (0, width)
            )
            vector = self.builder.fadd(low, high)
        return self.builder.extract_element(vector, ir.Constant(INT32, 0))


@intrinsic
def dot(typing_context, a, a_start, b, b_start, length):  # noqa: ARG001
    """Σ a[a_start + i] · b[b_start + i] for i < length, a multiple of LANES; a and b are contiguous float32."""

    def generate(context, builder, signature, arguments):
        emitter = Emitter(builder)
        first, second = (_pointer(context, builder, signature, arguments, i) for i in (0, 2))
        total = emitter.zeros()
        with cgutils.for_range(builder, builder.udiv(arguments[4], ir.Constant(INT64, LANES))) as loop:
            at = emitter.times(loop.index, LANES)
            x, y = (emitter.load(emitter.offset(pointer, at), FLOATS, 4) for pointer in (first, second))
            builder.store(emitter.multiply_add(x, y, builder.load(total)), total)
        return emitter.total(builder.load(total))

    return types.float32(a, types.intp, b, types.intp, types.intp), generate


@intrinsic
def add_scaled(typing_context, out, out_start, factor, b, b_start, length):  # noqa: ARG001
    """out[out_start + i] += factor · b[b_start + i] for i < length, a multiple of LANES."""

    def generate(context, builder, signature, arguments):
        emitter = Emitter(builder)
        target, source = (_pointer(context, builder, signature, arguments, i) for i in (0, 3))
        factor = emitter.splat(arguments[2])
        with cgutils.for_range(builder, builder.udiv(arguments[5], ir.Constant(INT64, LANES))) as loop:
            at = emitter.times(loop.index, LANES)
            x, y = (emitter.load(emitter.offset(pointer, at), FLOATS, 4) for pointer in (source, target))
            emitter.store(emitter.multiply_add(factor, x, y), emitter.offset(target, at))
        return context.get_dummy_value()

    return types.void(out, types.intp, types.float32, b, types.intp, types.intp), generate


def _pointer(context, builder, signature, arguments, i):
    """Where array argument i starts, moved on by argument i + 1."""
    array = context.make_array(signature.args[i])(context, builder, arguments[i])
    return builder.gep(array.data, [arguments[i + 1]])


@intrinsic
def _float_from_bits(typing_context, bits):  # noqa: ARG001
    def generate(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], FLOAT)

    return types.float32(types.int32), generate


@njit(inline="always")
def exp(x):
    """e^x in float32 to 2 units in the last place for -87 ≤ x ≤ 88, clamped outside; unlike libm's it vectorises."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    turns = np.float32(np.floor(x * np.float32(1.44269504) + np.float32(0.5)))
    r = x - turns * np.float32(0.693359375) + turns * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + np.float32(1.0)) * _float_from_bits((np.int32(turns) + np.int32(127)) << np.int32(23))
