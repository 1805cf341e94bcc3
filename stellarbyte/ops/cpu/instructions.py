"""Vector instructions for CPU kernels that LLVM's vectoriser does not vectorise.

Vectors have 16 lanes of float32: two AVX2 registers, one of AVX-512, four of NEON; LLVM splits them for the machine.
"""

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16

FLOAT, BYTE, INT32, INT64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
FLOATS, BYTES, INTS = (ir.VectorType(scalar, LANES) for scalar in (FLOAT, BYTE, INT32))
# Of e^r = 1 + r + r² · polynomial for |r| ≤ ln(2) / 2, highest power first (Cephes).
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def host_has(*features: str) -> bool:
    """Whether this processor has all features, by LLVM's names. False if numba was told to compile for another one: its
    code may not hold their instructions."""
    if numba.config.CPU_NAME is not None or numba.config.CPU_FEATURES is not None:
        return False
    return all(llvmlite.binding.get_host_cpu_features().get(feature) for feature in features)


class Emitter:
    """Short names for the kernels' LLVM instructions."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder
        self._fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(FLOATS, [FLOATS] * 3), f"llvm.fma.v{LANES}f32"
        )

    def zeros(self) -> ir.Value:
        """A vector variable (LLVM keeps it in registers), set to 0 at this point of the code."""
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

    def prefetch(self, pointer: ir.Value) -> None:
        """Have a line of memory read into the cache, without waiting for it; any address may be given."""
        address = BYTE.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [address, INT32, INT32, INT32])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0i8")
        to_read, near, is_data = (ir.Constant(INT32, n) for n in (0, 3, 1))
        self.builder.call(function, [self.builder.bitcast(pointer, address), to_read, near, is_data])

    def splat(self, scalar: ir.Value) -> ir.Value:
        vector = self.builder.insert_element(
            ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined), scalar, ir.Constant(INT32, 0)
        )
        return self.builder.shuffle_vector(vector, vector, ir.Constant(INTS, [0] * LANES))

    def lanes(self, first: ir.Value, second: ir.Value, numbers: list[int]) -> ir.Value:
        """A vector of chosen lanes of two vectors, numbered consecutively."""
        return self.builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(INT32, len(numbers)), numbers))

    def exp(self, x: ir.Value) -> ir.Value:
        """e^x of a vector, as `exp` below."""
        builder = self.builder

        def every(number: float) -> ir.Constant:
            return ir.Constant(FLOATS, [number] * LANES)

        for name, limit in (("maxnum", -87.0), ("minnum", 88.0)):
            x = self.call(name, x, every(limit))
        turns = self.call("floor", self.multiply_add(x, every(1.44269504), every(0.5)))
        r = self.multiply_add(turns, every(-0.693359375), x)
        r = self.multiply_add(turns, every(2.12194440e-4), r)
        p = every(_EXP[0])
        for coefficient in (*_EXP[1:], 1.0, 1.0):
            p = self.multiply_add(p, r, every(coefficient))
        exponent = builder.add(builder.fptosi(turns, INTS), ir.Constant(INTS, [127] * LANES))
        power = builder.bitcast(builder.shl(exponent, ir.Constant(INTS, [23] * LANES)), FLOATS)
        return builder.fmul(p, power)

    def call(self, name: str, *vectors: ir.Value) -> ir.Value:
        """An intrinsic function of LLVM for each lane."""
        kind = ir.FunctionType(FLOATS, [FLOATS] * len(vectors))
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.{name}.v{LANES}f32")
        return self.builder.call(function, vectors)

    def four_totals(self, vectors: list[ir.Value]) -> ir.Value:
        """The sums of the lanes of four vectors, as a vector of four."""
        half = LANES // 2
        low, high = list(range(half)), list(range(half, LANES))
        a, b, c, d = (self.builder.fadd(self.lanes(v, v, low), self.lanes(v, v, high)) for v in vectors)
        # Adds halves of two vectors at a time, down to one number for each of the four.
        ab, cd = (
            self.builder.fadd(
                self.lanes(x, y, [0, 1, 2, 3, 8, 9, 10, 11]), self.lanes(x, y, [4, 5, 6, 7, 12, 13, 14, 15])
            )
            for x, y in ((a, b), (c, d))
        )
        quarters = self.builder.fadd(
            self.lanes(ab, cd, [0, 1, 4, 5, 8, 9, 12, 13]), self.lanes(ab, cd, [2, 3, 6, 7, 10, 11, 14, 15])
        )
        return self.builder.fadd(
            self.lanes(quarters, quarters, [0, 2, 4, 6]), self.lanes(quarters, quarters, [1, 3, 5, 7])
        )


@intrinsic
def four_dots(typing_context, out, out_start, a, a_start, b, b_start, stride, length):
    """out[out_start + r] = Σ a[a_start + i] · b[b_start + r · stride + i] for r < 4 and i < length.

    `length` is a multiple of LANES; all arrays are contiguous float32.
    """

    def generate(context, builder, signature, arguments):
        emitter = Emitter(builder)
        target, first, second = (_pointer(context, builder, signature, arguments, i) for i in (0, 2, 4))
        rows = [emitter.offset(second, emitter.times(arguments[6], r)) for r in range(4)]
        sums = [emitter.zeros() for _ in rows]
        with cgutils.for_range(builder, builder.udiv(arguments[7], ir.Constant(INT64, LANES))) as loop:
            at = emitter.times(loop.index, LANES)
            x = emitter.load(emitter.offset(first, at), FLOATS, 4)
            for total, row in zip(sums, rows, strict=True):
                y = emitter.load(emitter.offset(row, at), FLOATS, 4)
                builder.store(emitter.multiply_add(x, y, builder.load(total)), total)
        totals = emitter.four_totals([builder.load(total) for total in sums])
        builder.store(totals, builder.bitcast(target, totals.type.as_pointer())).align = 4
        return context.get_dummy_value()

    integer = types.intp
    return types.void(out, integer, a, integer, b, integer, integer, integer), generate


@intrinsic
def sum_of_squares(typing_context, row):
    """Σ row[i]² of contiguous float32, in an order that depends only on its length: 4 vectors of 16 sums, and the rest
    of the row behind them."""

    def generate(context, builder, signature, arguments):
        emitter = Emitter(builder)
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        length = cgutils.unpack_tuple(builder, array.shape)[0]
        at_once = 4 * LANES
        sums = [emitter.zeros() for _ in range(4)]
        turns = builder.udiv(length, ir.Constant(INT64, at_once))
        with cgutils.for_range(builder, turns) as loop:
            for i, total in enumerate(sums):
                at = builder.add(emitter.times(loop.index, at_once), ir.Constant(INT64, i * LANES))
                x = emitter.load(emitter.offset(array.data, at), FLOATS, 4)
                builder.store(emitter.multiply_add(x, x, builder.load(total)), total)
        four = emitter.four_totals([builder.load(total) for total in sums])
        total = cgutils.alloca_once_value(builder, ir.Constant(FLOAT, 0.0))
        for i in range(4):
            number = builder.extract_element(four, ir.Constant(INT32, i))
            builder.store(builder.fadd(builder.load(total), number), total)
        with cgutils.for_range_slice(builder, emitter.times(turns, at_once), length, ir.Constant(INT64, 1)) as (
            index,
            _,
        ):
            x = builder.load(emitter.offset(array.data, index))
            builder.store(builder.fadd(builder.load(total), builder.fmul(x, x)), total)
        return builder.load(total)

    return types.float32(row), generate


@intrinsic
def add_weighted_rows(typing_context, out, out_start, w, w_start, b, b_start, stride, count, length):
    """out[out_start + i] += Σ_r w[w_start + r] · b[b_start + r · stride + i] for r < count and i < length.

    `length` is a multiple of LANES; all arrays are contiguous float32.
    """

    def generate(context, builder, signature, arguments):
        emitter = Emitter(builder)
        target, weights, source = (_pointer(context, builder, signature, arguments, i) for i in (0, 2, 4))
        stride, count, num_vectors = arguments[6], arguments[7], builder.udiv(arguments[8], ir.Constant(INT64, LANES))

        def add_vectors(number: int, at: ir.Value) -> None:
            """Compute `number` adjacent vectors of `out`, in registers over all rows."""
            starts = [builder.add(at, ir.Constant(INT64, i * LANES)) for i in range(number)]
            sums = [emitter.zeros() for _ in starts]
            for start, total in zip(starts, sums, strict=True):
                builder.store(emitter.load(emitter.offset(target, start), FLOATS, 4), total)
            with cgutils.for_range(builder, count) as loop:
                weight = emitter.splat(builder.load(emitter.offset(weights, loop.index)))
                row = emitter.offset(source, builder.mul(loop.index, stride))
                for start, total in zip(starts, sums, strict=True):
                    values = emitter.load(emitter.offset(row, start), FLOATS, 4)
                    builder.store(emitter.multiply_add(weight, values, builder.load(total)), total)
            for start, total in zip(starts, sums, strict=True):
                emitter.store(builder.load(total), emitter.offset(target, start))

        four = ir.Constant(INT64, 4)
        fours, ones = builder.udiv(num_vectors, four), builder.urem(num_vectors, four)
        with cgutils.for_range(builder, fours) as loop:
            add_vectors(4, emitter.times(loop.index, 4 * LANES))
        with cgutils.for_range(builder, ones) as loop:
            add_vectors(1, emitter.times(builder.add(emitter.times(fours, 4), loop.index), LANES))
        return context.get_dummy_value()

    integer = types.intp
    return types.void(out, integer, w, integer, b, integer, integer, integer, integer), generate


@intrinsic
def largest(typing_context, row, length):
    """The largest of row[i] for i < length, a multiple of LANES."""

    def generate(context, builder, signature, arguments):
        emitter = Emitter(builder)
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        best = cgutils.alloca_once_value(builder, emitter.load(data, FLOATS, 4))
        with cgutils.for_range(builder, builder.udiv(arguments[1], ir.Constant(INT64, LANES))) as loop:
            numbers = emitter.load(emitter.offset(data, emitter.times(loop.index, LANES)), FLOATS, 4)
            builder.store(emitter.call("maxnum", builder.load(best), numbers), best)
        numbers = builder.load(best)
        for distance in (8, 4, 2, 1):
            others = emitter.lanes(numbers, numbers, [(i + distance) % LANES for i in range(LANES)])
            numbers = emitter.call("maxnum", numbers, others)
        return builder.extract_element(numbers, ir.Constant(INT32, 0))

    return types.float32(row, types.intp), generate


@intrinsic
def exponentiate(typing_context, row, length, best, scale):
    """row[i] = e^((row[i] - best) · scale) for i < length, a multiple of LANES; returns their sum."""

    def generate(context, builder, signature, arguments):
        emitter = Emitter(builder)
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        best, scale = (emitter.splat(arguments[i]) for i in (2, 3))
        total = emitter.zeros()
        with cgutils.for_range(builder, builder.udiv(arguments[1], ir.Constant(INT64, LANES))) as loop:
            at = emitter.offset(data, emitter.times(loop.index, LANES))
            numbers = emitter.exp(builder.fmul(builder.fsub(emitter.load(at, FLOATS, 4), best), scale))
            emitter.store(numbers, at)
            builder.store(builder.fadd(builder.load(total), numbers), total)
        four = emitter.four_totals([builder.load(total)] * 4)
        return builder.extract_element(four, ir.Constant(INT32, 0))

    return types.float32(row, types.intp, types.float32, types.float32), generate


def _gate(num_rows: int):  # numba's own typing takes its place
    """An intrinsic: for each of one or two rows of 16 from `start` on, 8 gates and their 8 ups, out[row, i] =
    silu(gates[i]) · ups[i], written to sums[start + 8 · row + i]. All arrays are contiguous float32."""

    @intrinsic
    def gate(typing_context, sums, start):
        def generate(context, builder, signature, arguments):
            emitter, half = Emitter(builder), LANES // 2
            first = _pointer(context, builder, signature, arguments, 0)
            rows = [
                emitter.load(emitter.offset(first, ir.Constant(INT64, row * LANES)), FLOATS, 4)
                for row in range(num_rows)
            ]
            low, high = list(range(half)), list(range(half, LANES))
            x = emitter.lanes(rows[0], rows[-1], low + [LANES + i for i in low])
            ups = emitter.lanes(rows[0], rows[-1], high + [LANES + i for i in high])
            zero, one = (ir.Constant(FLOATS, [number] * LANES) for number in (0.0, 1.0))
            silu = builder.fdiv(x, builder.fadd(one, emitter.exp(builder.fsub(zero, x))))
            emitter.store(builder.fmul(silu, ups), first)
            return context.get_dummy_value()

        return types.void(sums, types.intp), generate

    return gate


gate_1, gate_2 = _gate(1), _gate(2)


@intrinsic
def add_lanes(typing_context, target, start, source, source_start):
    """target[start + i] += source[source_start + i] for i < LANES, contiguous float32."""

    def generate(context, builder, signature, arguments):
        emitter = Emitter(builder)
        to, of = (_pointer(context, builder, signature, arguments, i) for i in (0, 2))
        emitter.store(builder.fadd(emitter.load(to, FLOATS, 4), emitter.load(of, FLOATS, 4)), to)
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp), generate


def _copy(count: int):  # numba's own typing takes its place
    """An intrinsic: target[start + i] = source[source_start + i] for i < count, contiguous float32."""

    @intrinsic
    def copy(typing_context, target, start, source, source_start):
        def generate(context, builder, signature, arguments):
            emitter, kind = Emitter(builder), ir.VectorType(FLOAT, count)
            to, of = (_pointer(context, builder, signature, arguments, i) for i in (0, 2))
            numbers = emitter.load(of, kind, 4)
            builder.store(numbers, builder.bitcast(to, kind.as_pointer())).align = 4
            return context.get_dummy_value()

        return types.void(target, types.intp, source, types.intp), generate

    return copy


copy_lanes, copy_half = _copy(LANES), _copy(LANES // 2)


@intrinsic
def prefetch(typing_context, array, start, length):
    """Prefetch array[start : start + length], contiguous float32, into the cache."""

    def generate(context, builder, signature, arguments):
        emitter = Emitter(builder)
        first = _pointer(context, builder, signature, arguments, 0)
        with cgutils.for_range(builder, builder.udiv(arguments[2], ir.Constant(INT64, LANES))) as loop:
            emitter.prefetch(emitter.offset(first, emitter.times(loop.index, LANES)))
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), generate


def _pointer(context, builder, signature, arguments, i):
    """Pointer to array argument i, offset by argument i + 1."""
    array = context.make_array(signature.args[i])(context, builder, arguments[i])
    return builder.gep(array.data, [arguments[i + 1]])


@intrinsic
def _float_from_bits(typing_context, bits):
    def generate(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], FLOAT)

    return types.float32(types.int32), generate


@njit(inline="always")
def exp(x):
    """e^x in float32 to 2 units in the last place for -87 ≤ x ≤ 88, clamped outside; unlike libm's it vectorises."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    turns = np.float32(np.floor(x * np.float32(1.44269504) + np.float32(0.5)))
    r = x - turns * np.float32(0.693359375) + turns * np.float32(2.12194440e-4)
    p = np.float32(_EXP[0])
    p = p * r + np.float32(_EXP[1])
    p = p * r + np.float32(_EXP[2])
    p = p * r + np.float32(_EXP[3])
    p = p * r + np.float32(_EXP[4])
    p = p * r + np.float32(_EXP[5])
    return (p * r * r + r + np.float32(1.0)) * _float_from_bits((np.int32(turns) + np.int32(127)) << np.int32(23))
