"""Products of panels with many tokens by the matrix unit of x86 processors (AMX).

The unit multiplies bfloat16 numbers and adds them in float32. A float32 number is split into two bfloat16 numbers, high
and low, which keep 16 bits of its mantissa. A product is high · high + high · low + low · high; what is left out is at
most 2^-16 of it. So sums are close to those of float32, at a third of the unit's speed.
"""

import ctypes
import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from stellarbyte.ops.cpu.instructions import BYTE, FLOATS, INT64, INTS, LANES, Emitter, host_has

# T tokens, K columns, R rows of a panel

ROWS_OF_A_TILE = 16
COLUMNS_OF_A_TILE = 32  # bfloat16
BLOCKS_AT_ONCE = 2  # tiles of tokens, whose sums with two panels stay in the unit
TOKENS_AT_ONCE = BLOCKS_AT_ONCE * ROWS_OF_A_TILE

_SHORTS = ir.VectorType(ir.IntType(16), LANES)
_WEIGHTS, _TOKENS = (4, 5), (6, 7)  # the tiles for them; 0 to 3 are sums
_BYTES_OF_A_ROW, _BYTES_OF_A_TILE = 64, 1024
# The layout that the unit is configured with: palette 1, and for each of 8 tiles the bytes of a row and the rows.
_CONFIGURATION = bytes([1, *bytes(15), *(_BYTES_OF_A_ROW, 0) * 8, *bytes(16), *(ROWS_OF_A_TILE,) * 8, *bytes(8)])

IS_THERE = host_has("amx-tile", "amx-bf16")
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


def may_use_tiles() -> bool:
    """Whether the processor has the unit, and the kernel of the system lets this process use it: it is asked to."""
    if not IS_THERE or platform.system() != "Linux":
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0


def _call(builder: ir.IRBuilder, name: str, *arguments: ir.Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


def _tile(number: int) -> ir.Constant:
    return ir.Constant(BYTE, number)


@intrinsic
def configure_tiles(typing_context):
    """Prepare the unit for this thread, until `release_tiles`."""

    def generate(_context, builder, _signature, _arguments):
        if IS_THERE:
            kind = ir.ArrayType(BYTE, len(_CONFIGURATION))
            layout = cgutils.global_constant(builder, "tile_layout", ir.Constant(kind, bytearray(_CONFIGURATION)))
            _call(builder, "ldtilecfg", builder.bitcast(layout, BYTE.as_pointer()))
        return _context.get_dummy_value()

    return types.void(), generate


@intrinsic
def release_tiles(typing_context):
    """Give the unit back."""

    def generate(_context, builder, _signature, _arguments):
        if IS_THERE:
            _call(builder, "tilerelease")
        return _context.get_dummy_value()

    return types.void(), generate


def _tiled_product(num_blocks: int):
    """An intrinsic: sums[p, t, r] = Σ_c w_p[c, r] · x[t, c] for two panels p and `num_blocks` · 16 tokens.

    Its arguments are rows of `split_rows` from one block on, and two panels of `split_panel`.
    """

    @intrinsic
    def product(typing_context, rows, block, panels, sums):
        def generate(context, builder, signature, arguments):
            if not IS_THERE:
                return context.get_dummy_value()

            def array_of(i: int):
                return context.make_array(signature.args[i])(context, builder, arguments[i])

            def address(array, offset: ir.Value) -> ir.Value:
                return builder.gep(builder.bitcast(array.data, BYTE.as_pointer()), [offset])

            x, weights, target = array_of(0), array_of(2), array_of(3)
            number = ir.Constant(INT64, _BYTES_OF_A_ROW)
            turns = cgutils.unpack_tuple(builder, x.shape)[1]
            step = ir.Constant(INT64, 2 * _BYTES_OF_A_TILE)  # high and low
            width = builder.mul(turns, step)
            pairs = [(p, t) for p in range(2) for t in range(num_blocks)]
            for tile in range(len(pairs)):
                _call(builder, "tilezero", _tile(tile))
            with cgutils.for_range(builder, turns) as loop:
                at = builder.mul(loop.index, step)
                x_at = [
                    builder.add(at, builder.mul(width, builder.add(arguments[1], ir.Constant(INT64, t))))
                    for t in range(num_blocks)
                ]
                w_at = [builder.add(at, builder.mul(width, ir.Constant(INT64, p))) for p in range(2)]

                def load(tile: int, array, offset: ir.Value, part: int) -> None:
                    offset = builder.add(offset, ir.Constant(INT64, part * _BYTES_OF_A_TILE))
                    _call(builder, "tileloadd64", _tile(tile), address(array, offset), number)

                def multiply() -> None:
                    for tile, (p, t) in enumerate(pairs):
                        _call(builder, "tdpbf16ps", _tile(tile), _tile(_TOKENS[t]), _tile(_WEIGHTS[p]))

                for p in range(2):
                    load(_WEIGHTS[p], weights, w_at[p], 1)
                for t in range(num_blocks):
                    load(_TOKENS[t], x, x_at[t], 0)
                multiply()  # low weights, high tokens
                for p in range(2):
                    load(_WEIGHTS[p], weights, w_at[p], 0)
                multiply()  # both high
                for t in range(num_blocks):
                    load(_TOKENS[t], x, x_at[t], 1)
                multiply()
            for tile, (p, t) in enumerate(pairs):
                at = ir.Constant(INT64, (p * BLOCKS_AT_ONCE + t) * _BYTES_OF_A_TILE)
                _call(builder, "tilestored64", _tile(tile), address(target, at), number)
            return context.get_dummy_value()

        return types.void(rows, types.intp, panels, sums), generate

    return product


tiled_1, tiled_2 = _tiled_product(1), _tiled_product(2)


def _strip_product(num_panels: int):
    """An intrinsic: out[r, column + 16p + i] = Σ_c x[r, c] · w_p[c, i] over the first `steps` · 32 columns.

    r is one of a block of 16 rows, p one of up to four neighbouring panels. With four, a product need not wait for the
    one before it, whose sums are others.

    Its arguments are rows of `split_rows`, panels of `split_panel` and `out` [16, ≥ column + 16 · panels], float32.
    """

    @intrinsic
    def product(typing_context, rows, block, panels, panel, steps, out, column):
        def generate(context, builder, signature, arguments):
            if not IS_THERE:
                return context.get_dummy_value()

            def array_of(i: int):
                array = context.make_array(signature.args[i])(context, builder, arguments[i])
                return builder.bitcast(array.data, BYTE.as_pointer()), cgutils.unpack_tuple(builder, array.shape)

            (x, x_shape), (weights, w_shape), (target, out_shape) = (array_of(i) for i in (0, 2, 5))
            number, step = (ir.Constant(INT64, count) for count in (_BYTES_OF_A_ROW, 2 * _BYTES_OF_A_TILE))
            starts = [builder.gep(x, [builder.mul(arguments[1], builder.mul(x_shape[1], step))])]
            for p in range(num_panels):
                index = builder.add(arguments[3], ir.Constant(INT64, p))
                starts.append(builder.gep(weights, [builder.mul(index, builder.mul(w_shape[1], step))]))
            for p in range(num_panels):
                _call(builder, "tilezero", _tile(p))
            with cgutils.for_range(builder, arguments[4]) as loop:
                at = builder.mul(loop.index, step)
                low = builder.add(at, ir.Constant(INT64, _BYTES_OF_A_TILE))

                def load(tile: int, start: ir.Value, offset: ir.Value) -> None:
                    _call(builder, "tileloadd64", _tile(tile), builder.gep(start, [offset]), number)

                def multiply(tokens: int, offset: ir.Value) -> None:
                    for p in range(num_panels):
                        load(_WEIGHTS[p % 2], starts[1 + p], offset)
                        _call(builder, "tdpbf16ps", _tile(p), _tile(tokens), _tile(_WEIGHTS[p % 2]))

                for part, offset in enumerate((at, low)):
                    load(_TOKENS[part], starts[0], offset)
                multiply(_TOKENS[0], at)
                multiply(_TOKENS[1], at)
                multiply(_TOKENS[0], low)
            stride = builder.mul(out_shape[1], ir.Constant(INT64, 4))
            for p in range(num_panels):
                place = builder.add(arguments[6], ir.Constant(INT64, p * LANES))
                address = builder.gep(target, [builder.mul(place, ir.Constant(INT64, 4))])
                _call(builder, "tilestored64", _tile(p), address, stride)
            return context.get_dummy_value()

        integer = types.intp
        return types.void(rows, integer, panels, integer, integer, out, integer), generate

    return product


strip_1, strip_2, strip_4 = _strip_product(1), _strip_product(2), _strip_product(4)


class _Splitter(Emitter):
    """LLVM instructions that split float32 numbers."""

    def halves(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The high and the low bfloat16 numbers of a vector, in the upper halves of integers."""
        high = self._rounded(x)
        return high, self._rounded(self.builder.fsub(x, self.builder.bitcast(high, FLOATS)))

    def _rounded(self, x: ir.Value) -> ir.Value:
        """To the nearest bfloat16 number; of two, to the even one."""
        builder, bits = self.builder, self.builder.bitcast(x, INTS)
        is_odd = builder.and_(builder.lshr(bits, self._every(16)), self._every(1))
        rounded = builder.add(bits, builder.add(is_odd, self._every(0x7FFF)))
        is_nan = builder.icmp_unsigned(">", builder.and_(bits, self._every(0x7FFFFFFF)), self._every(0x7F800000))
        rounded = builder.select(is_nan, builder.or_(bits, self._every(0x00400000)), rounded)  # its addition overflows
        return builder.and_(rounded, self._every(0xFFFF0000))

    def words(self, even: ir.Value, odd: ir.Value) -> ir.Value:
        """The numbers of two columns, side by side."""
        return self.builder.or_(self.builder.lshr(even, self._every(16)), odd)

    def _short(self, bits: ir.Value) -> ir.Value:
        return self.builder.trunc(self.builder.lshr(bits, self._every(16)), _SHORTS)

    def store_row(self, block: ir.Value, row: ir.Value, part: ir.Value, numbers: ir.Value) -> None:
        """Numbers 16 · part.. of a row of a block [K/32, 2, 16, 32], whose address is given."""
        builder = self.builder
        step, side = (op(part, ir.Constant(INT64, 2)) for op in (builder.udiv, builder.urem))
        at = builder.add(self.times(step, 2 * _BYTES_OF_A_TILE), self.times(side, _BYTES_OF_A_ROW // 2))
        at = builder.add(at, self.times(row, _BYTES_OF_A_ROW))
        for which, bits in enumerate(self.halves(numbers)):
            place = builder.add(at, ir.Constant(INT64, which * _BYTES_OF_A_TILE))
            pointer = builder.bitcast(builder.gep(block, [place]), _SHORTS.as_pointer())
            builder.store(self._short(bits), pointer).align = 2

    @staticmethod
    def _every(number: int) -> ir.Constant:
        return ir.Constant(INTS, [number] * LANES)


@intrinsic
def split_row(typing_context, x, number, blocks, block, row):
    """Row `number` of x [T, K] as bfloat16 numbers whose sum is x, but for its last 8 bits.

    They become row `row` of blocks[block] [K/32, 2, 16, 32], uint16.
    """

    def generate(context, builder, signature, arguments):
        splitter = _Splitter(builder)
        source, target = (context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 2))
        num_columns = cgutils.unpack_tuple(builder, source.shape)[1]
        part = builder.gep(source.data, [builder.mul(arguments[1], num_columns)])
        at = builder.mul(arguments[3], splitter.times(num_columns, 2 * 2 * ROWS_OF_A_TILE))
        target = builder.gep(builder.bitcast(target.data, BYTE.as_pointer()), [at])
        with cgutils.for_range(builder, builder.udiv(num_columns, ir.Constant(INT64, LANES))) as loop:
            numbers = splitter.load(splitter.offset(part, splitter.times(loop.index, LANES)), FLOATS, 4)
            splitter.store_row(target, arguments[4], loop.index, numbers)
        return context.get_dummy_value()

    return types.void(x, types.intp, blocks, types.intp, types.intp), generate


@intrinsic
def rotate_row(typing_context, x, number, column, cos, sin, decay, offset, block, row):
    """A head of row `number` of x [T, ≥ column + D], rotated as a query (`attention.rotate`), as row `row` of a block.

    The tables have contiguous rows of D/2 numbers; the block is [1, D/32, 2, 16, 32].
    """

    def generate(context, builder, signature, arguments):
        splitter = _Splitter(builder)
        source, *tables, target = (
            context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 3, 4, 5, 7)
        )
        width = cgutils.unpack_tuple(builder, source.shape)[1]
        half = cgutils.unpack_tuple(builder, tables[0].shape)[1]
        head = builder.gep(source.data, [builder.add(builder.mul(arguments[1], width), arguments[2])])
        rows = [builder.gep(table.data, [builder.mul(arguments[6], half)]) for table in tables]
        block = builder.bitcast(target.data, BYTE.as_pointer())
        parts = builder.udiv(half, ir.Constant(INT64, LANES))
        with cgutils.for_range(builder, parts) as loop:
            at = splitter.times(loop.index, LANES)
            first, second, cos, sin, decay = (
                splitter.load(splitter.offset(start, at), FLOATS, 4)
                for start in (head, splitter.offset(head, half), *rows)
            )
            cos, sin = builder.fmul(cos, decay), builder.fmul(sin, decay)
            left = builder.fsub(builder.fmul(first, cos), builder.fmul(second, sin))
            right = builder.fadd(builder.fmul(second, cos), builder.fmul(first, sin))
            splitter.store_row(block, arguments[8], loop.index, left)
            splitter.store_row(block, arguments[8], builder.add(parts, loop.index), right)
        return context.get_dummy_value()

    integer = types.intp
    return types.void(x, integer, integer, cos, sin, decay, integer, block, integer), generate


@intrinsic
def split_panel(typing_context, panel, panels, number):
    """A panel [K, R] in float32 as pairs of columns: panels[number] [K/32, 2, 16, R], uint32."""

    def generate(context, builder, signature, arguments):
        splitter = _Splitter(builder)
        source, target = (context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 1))
        num_columns = cgutils.unpack_tuple(builder, source.shape)[0]
        first = builder.gep(target.data, [builder.mul(arguments[2], splitter.times(num_columns, LANES))])
        with cgutils.for_range(builder, builder.udiv(num_columns, ir.Constant(INT64, 2))) as loop:
            at = splitter.offset(source.data, splitter.times(loop.index, 2 * LANES))
            even, odd = (splitter.load(splitter.offset(at, ir.Constant(INT64, i * LANES)), FLOATS, 4) for i in range(2))
            step, pair = (op(loop.index, ir.Constant(INT64, 16)) for op in (builder.udiv, builder.urem))
            place = builder.add(splitter.times(step, 2 * 16 * LANES), splitter.times(pair, LANES))
            for which, both in enumerate(zip(splitter.halves(even), splitter.halves(odd), strict=True)):
                pointer = builder.gep(first, [builder.add(place, ir.Constant(INT64, which * 16 * LANES))])
                builder.store(splitter.words(*both), builder.bitcast(pointer, INTS.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(panel, panels, types.intp), generate
