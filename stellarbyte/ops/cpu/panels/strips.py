"""Products of several rows with one or two panels of float32, for attention."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from stellarbyte.ops.cpu.instructions import FLOATS, INT64, Emitter
from stellarbyte.ops.cpu.panels.sizes import HAS_LARGE_TILES, PANEL_ROWS

QUERIES_AT_ONCE = 8 if HAS_LARGE_TILES else 4  # of `query_strip_2`, and of `query_strip_1`


def _query_strip(num_panels: int):  # numba's own typing takes its place
    """An intrinsic: out[row + i, column + 16 · p + r] = Σ_c x[row + i, c] · panels[first + p, c, r] for c < `length`,
    i < QUERIES_AT_ONCE and `num_panels` panels p of float32."""

    @intrinsic
    def product(typing_context, x, row, panels, first, length, out, column):
        def generate(context, builder, signature, arguments):
            emitter = Emitter(builder)
            sums = [emitter.zeros() for _ in range(QUERIES_AT_ONCE * num_panels)]
            rows, weights, target = (
                context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 2, 5)
            )

            def row_of(array, number: ir.Value) -> ir.Value:
                return emitter.offset(array.data, builder.mul(number, cgutils.unpack_tuple(builder, array.shape)[1]))

            numbers = [builder.add(arguments[1], ir.Constant(INT64, i)) for i in range(QUERIES_AT_ONCE)]
            x_rows = [row_of(rows, number) for number in numbers]
            size = emitter.times(cgutils.unpack_tuple(builder, weights.shape)[1], PANEL_ROWS)
            starts = [
                emitter.offset(weights.data, builder.mul(builder.add(arguments[3], ir.Constant(INT64, p)), size))
                for p in range(num_panels)
            ]
            with cgutils.for_range(builder, arguments[4]) as loop:
                place = emitter.times(loop.index, PANEL_ROWS)
                columns = [emitter.load(emitter.offset(start, place), FLOATS, 4) for start in starts]
                for i, x_row in enumerate(x_rows):
                    number = emitter.splat(builder.load(emitter.offset(x_row, loop.index)))
                    for p, values in enumerate(columns):
                        total = sums[p * QUERIES_AT_ONCE + i]
                        builder.store(emitter.multiply_add(values, number, builder.load(total)), total)
            for i, number in enumerate(numbers):
                at = emitter.offset(row_of(target, number), arguments[6])
                for p in range(num_panels):
                    total = builder.load(sums[p * QUERIES_AT_ONCE + i])
                    emitter.store(total, emitter.offset(at, ir.Constant(INT64, p * PANEL_ROWS)))
            return context.get_dummy_value()

        integer = types.intp
        return types.void(x, integer, panels, integer, integer, out, integer), generate

    return product


query_strip_1, query_strip_2 = _query_strip(1), _query_strip(2)
