"""Products of float32 and fp8 panels with a few tokens, whose sums stay in registers, and unpacking, on the CPU.

A weight matrix is stored in panels of 16 rows, column by column, so that one vector register holds one column of a
panel and a token's value is broadcast against it. LLVM's vectoriser does not produce this code, so the innermost loop
consists of LLVM instructions.

Weights are float32, fp8 (e4m3, a scale for every 64 columns of a row), int8 or int4; those of the last two are only
unpacked here, and multiplied by `integers`.
"""

from collections.abc import Callable, Iterator

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from stellarbyte.ops.cpu.instructions import BYTE, BYTES, FLOATS, INT64, INTS, LANES, Emitter
from stellarbyte.ops.cpu.panels.integers import COLUMNS_OF_A_WORD
from stellarbyte.ops.cpu.panels.sizes import (
    HAS_LARGE_TILES,
    INT4_GROUP,
    INT8_GROUP,
    LARGEST_TILE,
    LINES_AHEAD,
    PANEL_ROWS,
    TILE_SIZES,
)

TOKENS_OF_PAIRS = LARGEST_TILE if HAS_LARGE_TILES else 2**62

_COLUMNS_AT_ONCE = 4

Column = tuple[ir.Value, ir.Value]  # weights as float32, its number
Visit = Callable[[ir.Value, ir.Value], None]


class _PanelEmitter(Emitter):
    """LLVM instructions for the dot products of one panel with `num_tokens` rows of x.

    `by_groups`: a sum of a group's numbers is scaled once, which is faster for few tokens, but another order of sums.
    """

    def __init__(self, builder: ir.IRBuilder, num_tokens: int, *, by_groups: bool = False) -> None:
        super().__init__(builder)
        self.sums = [self.zeros() for _ in range(num_tokens)]
        self.by_groups = by_groups

    def add_column(self, sums: list[ir.Value], weights: ir.Value, x_rows: list[ir.Value], column: ir.Value) -> None:
        """sums[t] += weights · x[t, column]"""
        for total, row in zip(sums, x_rows, strict=True):
            self.add_product(total, weights, self.splat(self.builder.load(self.offset(row, column))))

    def add_panel(self, panel: "_Panel", num_columns: ir.Value, x_rows: list[ir.Value]) -> None:
        """Emit self.sums[t] += panel · x[t]."""
        if self.by_groups and panel.kind == "fp8":
            self._add_groups(panel, num_columns, x_rows)
        else:
            self.for_each_column(panel, num_columns, lambda w, column: self.add_column(self.sums, w, x_rows, column))

    def for_each_column(self, panel: "_Panel", num_columns: ir.Value, visit: Visit) -> None:
        """Emit a loop that calls visit(weights of a column as float32, its number)."""
        if panel.kind == "float32":
            with cgutils.for_range(self.builder, num_columns) as loop:
                visit(self.ahead(panel.weights, self.times(loop.index, PANEL_ROWS)), loop.index)
            return
        for group, columns in self._groups(panel, num_columns):
            scale = self._of_group(panel.scales, group)
            minimum = self._of_group(panel.minima, group) if panel.kind == "int4" else None
            for numbers, column in columns:
                if minimum is None:
                    visit(self.builder.fmul(numbers, scale), column)
                else:
                    visit(self.multiply_add(numbers, scale, minimum), column)

    def _add_groups(self, panel: "_Panel", num_columns: ir.Value, x_rows: list[ir.Value]) -> None:
        """Σ number · scale · x as scale · Σ number · x, group by group.

        With few tokens each column would wait for the previous sum, so adjacent columns have separate sums.
        """
        partial = [[self.zeros() for _ in x_rows] for _ in range(_COLUMNS_AT_ONCE)]
        for group, columns in self._groups(panel, num_columns):
            for total in (total for sums in partial for total in sums):
                self.builder.store(ir.Constant(FLOATS, [0.0] * LANES), total)
            for i, (numbers, column) in enumerate(columns):
                self.add_column(partial[i], numbers, x_rows, column)
            scale = self._of_group(panel.scales, group)
            for t, total in enumerate(self.sums):
                value = self.builder.load(partial[0][t])
                for sums in partial[1:]:
                    value = self.builder.fadd(value, self.builder.load(sums[t]))
                self.add_product(total, scale, value)

    def _groups(self, panel: "_Panel", num_columns: ir.Value) -> Iterator[tuple[ir.Value, Iterator[Column]]]:
        """Emit a loop over groups, its body between two items; inside it one over columns, a few in each turn."""
        size = INT4_GROUP if panel.kind == "int4" else INT8_GROUP
        columns_of = self._fp8_columns if panel.kind == "fp8" else self._word_columns
        with cgutils.for_range(self.builder, self.builder.udiv(num_columns, ir.Constant(INT64, size))) as loop:
            yield loop.index, columns_of(panel, self.times(loop.index, size))

    def _fp8_columns(self, panel: "_Panel", first: ir.Value) -> Iterator[Column]:
        builder = self.builder
        with cgutils.for_range(builder, ir.Constant(INT64, INT8_GROUP // _COLUMNS_AT_ONCE)) as loop:
            turn = builder.add(first, self.times(loop.index, _COLUMNS_AT_ONCE))
            self._prefetch_ahead(self.offset(panel.weights, self.times(turn, PANEL_ROWS)), 1)
            for place in range(_COLUMNS_AT_ONCE):
                column = builder.add(turn, ir.Constant(INT64, place))
                codes = self.load(self.offset(panel.weights, self.times(column, PANEL_ROWS)), BYTES, 1)
                yield self._fp8_number(codes), column

    def _fp8_number(self, codes: ir.Value) -> ir.Value:
        """e4m3 as float32: exponent and mantissa move to their places there, with the other bias; the numbers below
        2^-6, which have no leading 1, are multiples of 2^-9."""
        builder = self.builder
        bits = builder.zext(codes, INTS)

        def constant(value: int) -> ir.Constant:
            return ir.Constant(INTS, [value] * PANEL_ROWS)

        size = builder.and_(bits, constant(0x7F))
        sign = builder.shl(builder.and_(bits, constant(0x80)), constant(24))
        normal = builder.add(builder.shl(size, constant(20)), constant((127 - 7) << 23))
        small = builder.fmul(builder.sitofp(size, FLOATS), ir.Constant(FLOATS, [2.0**-9] * PANEL_ROWS))
        is_small = builder.icmp_signed("<", size, constant(8))
        magnitude = builder.select(is_small, builder.bitcast(small, INTS), normal)
        return builder.bitcast(builder.or_(magnitude, sign), FLOATS)

    def _word_columns(self, panel: "_Panel", first: ir.Value) -> Iterator[Column]:
        """Those of `integers.code_pairs`: adjacent columns are in the two halves of a word."""
        builder, columns = self.builder, COLUMNS_OF_A_WORD[panel.codes]
        bits = 32 // columns
        size = INT8_GROUP if panel.kind == "int8" else INT4_GROUP
        extend = builder.ashr if panel.kind == "int8" else builder.lshr
        with cgutils.for_range(builder, ir.Constant(INT64, size // columns)) as loop:
            turn = builder.add(first, self.times(loop.index, columns))
            word = builder.udiv(turn, ir.Constant(INT64, columns))
            words = self.load(self.offset(panel.weights, self.times(word, PANEL_ROWS)), INTS, 4)
            for place in range(columns):
                end = 16 * (place % 2) + bits * (place // 2 + 1)
                codes = builder.shl(words, ir.Constant(INTS, [32 - end] * LANES))
                codes = extend(codes, ir.Constant(INTS, [32 - bits] * LANES))
                yield builder.sitofp(codes, FLOATS), builder.add(turn, ir.Constant(INT64, place))

    def ahead(self, weights: ir.Value, place: ir.Value) -> ir.Value:
        """The vector weights[place:] of float32, with a prefetch of one further on."""
        pointer = self.offset(weights, place)
        self._prefetch_ahead(pointer, 4)
        return self.load(pointer, FLOATS, 4)

    def _prefetch_ahead(self, weights: ir.Value, size: int) -> None:
        """Read what stands some lines behind `weights`, of numbers of `size` bytes, into the cache."""
        self.prefetch(self.offset(weights, ir.Constant(INT64, LINES_AHEAD * 64 // size)))

    def _of_group(self, numbers: ir.Value, group: ir.Value) -> ir.Value:
        return self.load(self.offset(numbers, self.times(group, PANEL_ROWS)), FLOATS, 4)

    def add_product(self, total: ir.Value, a: ir.Value, b: ir.Value) -> None:
        self.builder.store(self.multiply_add(a, b, self.builder.load(total)), total)


class _Panel:
    """One panel of a packed weight, from the first four arguments of an intrinsic: weight and panel number."""

    def __init__(self, context, builder, signature, arguments) -> None:
        kinds = {types.float32: "float32", types.uint8: "fp8", types.int32: "int8", types.uint32: "int4"}
        self.codes = signature.args[0].dtype
        self.kind = kinds[self.codes]
        self.weights, self.scales, self.minima = (
            self._start(builder, context.make_array(signature.args[i])(context, builder, arguments[i]), arguments[3])
            for i in range(3)
        )

    @staticmethod
    def _start(builder: ir.IRBuilder, array, panel: ir.Value) -> ir.Value:
        stride = cgutils.unpack_tuple(builder, array.strides)[0]
        start = builder.gep(builder.bitcast(array.data, BYTE.as_pointer()), [builder.mul(panel, stride)])
        return builder.bitcast(start, array.data.type)


def _panel_product(num_tokens: int, *, by_groups: bool = False):  # numba's own typing takes its place
    """An intrinsic: sums[t, r] = Σ_c weights[panel, c, r] · x[first + t, c] for `num_tokens` tokens."""

    @intrinsic
    def product(typing_context, weights, scales, minima, panel, x, first, sums):
        signature = types.void(weights, scales, minima, types.intp, x, types.intp, sums)

        def generate(context, builder, signature, arguments):
            tokens = [builder.add(arguments[5], ir.Constant(INT64, t)) for t in range(num_tokens)]

            rows = context.make_array(signature.args[4])(context, builder, arguments[4])
            num_columns = cgutils.unpack_tuple(builder, rows.shape)[1]
            x_rows = [builder.gep(rows.data, [builder.mul(token, num_columns)]) for token in tokens]
            panel = _Panel(context, builder, signature, arguments)
            emitter = _PanelEmitter(builder, num_tokens, by_groups=by_groups)
            emitter.add_panel(panel, num_columns, x_rows)
            sums = context.make_array(signature.args[6])(context, builder, arguments[6]).data
            for t, total in enumerate(emitter.sums):
                emitter.store(builder.load(total), builder.gep(sums, [ir.Constant(INT64, t * PANEL_ROWS)]))
            return context.get_dummy_value()

        return signature, generate

    return product


@intrinsic
def unpack_panel(typing_context, weights, scales, minima, panel, num_columns, out, place):
    """Write a panel to out[place] [K, R] as float32."""
    signature = types.void(weights, scales, minima, types.intp, types.intp, out, types.intp)

    def generate(context, builder, signature, arguments):
        emitter = _PanelEmitter(builder, 0)
        size = emitter.times(builder.mul(arguments[6], arguments[4]), PANEL_ROWS)
        target = builder.gep(context.make_array(signature.args[5])(context, builder, arguments[5]).data, [size])
        panel = _Panel(context, builder, signature, arguments)
        emitter.for_each_column(
            panel,
            arguments[4],
            lambda w, column: emitter.store(w, emitter.offset(target, emitter.times(column, PANEL_ROWS))),
        )
        return context.get_dummy_value()

    return signature, generate


def _pair_product(num_tokens: int):  # numba's own typing takes its place
    """An intrinsic: sums[i, t, r] = Σ_c panels[i, c, r] · x[first + t, c] for two float32 panels, `num_tokens` tokens.

    Meanwhile it prefetches part number `turn` of `turns` of the two panels `ahead` numbers after these.
    """

    @intrinsic
    def product(typing_context, panels, x, first, sums, ahead, turn, turns):
        integer = types.intp
        signature = types.void(panels, x, integer, sums, integer, integer, integer)

        def generate(context, builder, signature, arguments):
            if not HAS_LARGE_TILES:
                return context.get_dummy_value()  # never called: no number of tokens reaches TOKENS_OF_PAIRS
            weights, rows, out = (
                context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 1, 3)
            )
            _, _, first, _, ahead, turn, turns = arguments
            num_columns = cgutils.unpack_tuple(builder, rows.shape)[1]
            emitter = _PanelEmitter(builder, 2 * num_tokens)
            starts = [weights.data, emitter.offset(weights.data, emitter.times(num_columns, PANEL_ROWS))]
            tokens = [builder.add(first, ir.Constant(INT64, t)) for t in range(num_tokens)]
            x_rows = [emitter.offset(rows.data, builder.mul(token, num_columns)) for token in tokens]
            # A panel's K lines, one a column, are divided among turns · K prefetches: steps in 2^-16 numbers.
            step = builder.udiv(ir.Constant(INT64, PANEL_ROWS << 16), turns)
            columns_before = builder.mul(turn, num_columns)
            with cgutils.for_range(builder, num_columns) as loop:
                place = builder.mul(builder.add(columns_before, loop.index), step)
                place = builder.add(ahead, builder.lshr(place, ir.Constant(INT64, 16)))
                columns = []
                for start in starts:
                    # After the last panels this address may be unmapped: a prefetch does not fault.
                    emitter.prefetch(emitter.offset(start, place))
                    at = emitter.offset(start, emitter.times(loop.index, PANEL_ROWS))
                    columns.append(emitter.load(at, FLOATS, 4))
                for t, row in enumerate(x_rows):
                    number = emitter.splat(builder.load(emitter.offset(row, loop.index)))
                    for i, column in enumerate(columns):
                        emitter.add_product(emitter.sums[i * num_tokens + t], column, number)
            for i in range(2):
                for t in range(num_tokens):
                    at = ir.Constant(INT64, (i * LARGEST_TILE + t) * PANEL_ROWS)
                    emitter.store(builder.load(emitter.sums[i * num_tokens + t]), emitter.offset(out.data, at))
            return context.get_dummy_value()

        return signature, generate

    return product


_pair_12, _pair_8 = _pair_product(12), _pair_product(8)


@njit(inline="always")
def pair_tile(num_tokens):
    """Of so many tokens, how many the next of ⌈num_tokens / 12⌉ passes over two panels takes: 13 to 16 are divided into
    8 and 8. The last pass may take more than are left."""
    return 12 if num_tokens > 16 or 8 < num_tokens <= 12 else 8


@njit(inline="always")
def pair_product(panels, x, first, num_tokens, sums, ahead, turn, turns):
    """sums[i] = the products of two of `float32_panels` with rows of x, as many as a `pair_tile`."""
    if num_tokens == 12:
        _pair_12(panels, x, first, sums, ahead, turn, turns)
    else:
        _pair_8(panels, x, first, sums, ahead, turn, turns)


def _choice(sizes: tuple[int, ...]):  # numba's own typing takes its place
    """The product for a number of tokens that is one of `sizes`, as a chain of conditions."""
    size, product = sizes[0], _panel_product(sizes[0])

    @njit(inline="always")
    def last(weights, scales, minima, panel, x, first, num_tokens, sums):
        product(weights, scales, minima, panel, x, first, sums)

    if len(sizes) == 1:
        return last
    others = _choice(sizes[1:])

    @njit(inline="always")
    def choose(weights, scales, minima, panel, x, first, num_tokens, sums):
        if num_tokens == size:
            product(weights, scales, minima, panel, x, first, sums)
        else:
            others(weights, scales, minima, panel, x, first, num_tokens, sums)

    return choose


_product_of = _choice(TILE_SIZES)
_grouped_1, _grouped_2 = (_panel_product(n, by_groups=True) for n in (1, 2))


@njit(inline="always")
def fp8_product(weights, scales, minima, panel, x, first, num_tokens, sums, is_invariant):
    """sums = a packed panel's products with rows of x, as many as a `tile_size`; `is_invariant`: in the same order for
    any number."""
    if num_tokens == 1 and not is_invariant:
        _grouped_1(weights, scales, minima, panel, x, first, sums)
    elif num_tokens == 2 and not is_invariant:
        _grouped_2(weights, scales, minima, panel, x, first, sums)
    else:
        _product_of(weights, scales, minima, panel, x, first, num_tokens, sums)


def float32_panels(weight, panel, number, buffer):
    """Panels as [number, K, R] float32: where they are, or in `buffer`. In compiled code only."""
    raise NotImplementedError


@overload(float32_panels)
def _float32_panels(weight, panel, number, buffer):
    def stored(weight, panel, number, buffer):
        return weight[0][panel : panel + number]

    def unpacked(weight, panel, number, buffer):
        weights, scales, minima = weight
        for i in range(number):
            unpack_panel(weights, scales, minima, panel + i, buffer.shape[1], buffer, i)
        return buffer

    return stored if weight[0].dtype == types.float32 else unpacked


@njit(inline="always")
def tile_product(panels, scales, minima, panel, x, first, num_tokens, sums):
    """sums = the products of one of `float32_panels` with rows of x, as many as a `tile_size`. What belongs to the
    weight's stored form is not read."""
    _product_of(panels, scales, minima, panel, x, first, num_tokens, sums)
