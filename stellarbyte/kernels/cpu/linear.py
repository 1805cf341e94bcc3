"""Products of packed weights with a few tokens or many, on the CPU. Knows no model.

A weight matrix is stored in panels of 16 rows, column by column, so that one vector register holds one column of a
panel and a token's value is broadcast against it. Each panel is read from memory once for up to 6 tokens, at the
machine's full read speed, which torch's products do not reach for small batches; for many tokens the same kernel runs
at the speed of the multipliers. LLVM's vectoriser does not find this by itself, so the innermost loop is written as
LLVM instructions.

Weights are float32, int8 (a scale for every 64 columns of a row) or int4 (two columns a byte, a scale and a minimum
for every 32); activations are float32.
"""

import math
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from stellarbyte.kernels.cpu.instructions import BYTE, BYTES, FLOATS, INT64, INTS, LANES, Emitter, exp

# T tokens, N rows, K columns, P panels of R rows

PANEL_ROWS = LANES
TOKENS_PER_TILE = 6  # 6 tokens × 16 rows are 12 AVX2 accumulators; weights and a broadcast take the other 4 registers
INT8_GROUP = 64
INT4_GROUP = 32

NO_ACTIVATION, SILU, GELU, GELU_TANH = range(4)
ACTIVATIONS = {"silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH}

Visit = Callable[[ir.Value, ir.Value], None]


class _PanelEmitter(Emitter):
    """LLVM instructions for the dot products of one panel with `num_tokens` rows of x."""

    def __init__(self, builder: ir.IRBuilder, num_tokens: int) -> None:
        super().__init__(builder)
        self.sums = [self.zeros() for _ in range(num_tokens)]

    def add_column(self, weights: ir.Value, x_rows: list[ir.Value], column: ir.Value) -> None:
        """sums[t] += weights · x[t, column]"""
        for total, row in zip(self.sums, x_rows, strict=True):
            value = self.splat(self.builder.load(self.offset(row, column)))
            self.builder.store(self.multiply_add(weights, value, self.builder.load(total)), total)

    def for_each_column(self, panel: "_Panel", num_columns: ir.Value, visit: Visit) -> None:
        """Emit a loop that calls visit(weights of a column as float32, its number)."""
        if panel.kind == types.float32:
            with cgutils.for_range(self.builder, num_columns) as loop:
                visit(self.load(self.offset(panel.weights, self.times(loop.index, PANEL_ROWS)), FLOATS, 4), loop.index)
        elif panel.kind == types.int8:
            self._int8_columns(panel, num_columns, visit)
        else:
            self._int4_columns(panel, num_columns, visit)

    def _int8_columns(self, panel: "_Panel", num_columns: ir.Value, visit: Visit) -> None:
        builder, per_group = self.builder, ir.Constant(INT64, INT8_GROUP)
        with cgutils.for_range(builder, builder.udiv(num_columns, per_group)) as group:
            scale = self.load(self.offset(panel.scales, self.times(group.index, PANEL_ROWS)), FLOATS, 4)
            first = builder.mul(group.index, per_group)
            with cgutils.for_range(builder, per_group) as loop:
                column = builder.add(first, loop.index)
                integers = self.load(self.offset(panel.weights, self.times(column, PANEL_ROWS)), BYTES, 1)
                visit(builder.fmul(builder.sitofp(builder.sext(integers, INTS), FLOATS), scale), column)

    def _int4_columns(self, panel: "_Panel", num_columns: ir.Value, visit: Visit) -> None:
        builder, pairs = self.builder, ir.Constant(INT64, INT4_GROUP // 2)
        four, fifteen = (ir.Constant(BYTES, [n] * PANEL_ROWS) for n in (4, 15))
        with cgutils.for_range(builder, builder.udiv(num_columns, ir.Constant(INT64, INT4_GROUP))) as group:
            at = self.times(group.index, PANEL_ROWS)
            scale = self.load(self.offset(panel.scales, at), FLOATS, 4)
            minimum = self.load(self.offset(panel.minima, at), FLOATS, 4)
            first_pair = builder.mul(group.index, pairs)
            with cgutils.for_range(builder, pairs) as loop:
                pair = builder.add(first_pair, loop.index)
                both = self.load(self.offset(panel.weights, self.times(pair, PANEL_ROWS)), BYTES, 1)
                for place, nibbles in enumerate((builder.and_(both, fifteen), builder.lshr(both, four))):
                    values = builder.sitofp(builder.zext(nibbles, INTS), FLOATS)
                    column = builder.add(self.times(pair, 2), ir.Constant(INT64, place))
                    visit(self.multiply_add(values, scale, minimum), column)


class _Panel:
    """Where one panel of a packed weight lies: the first four arguments of an intrinsic are weight and panel number."""

    def __init__(self, context, builder, signature, arguments) -> None:
        self.kind = signature.args[0].dtype
        self.weights, self.scales, self.minima = (
            self._start(builder, context.make_array(signature.args[i])(context, builder, arguments[i]), arguments[3])
            for i in range(3)
        )

    @staticmethod
    def _start(builder: ir.IRBuilder, array, panel: ir.Value) -> ir.Value:
        stride = cgutils.unpack_tuple(builder, array.strides)[0]
        start = builder.gep(builder.bitcast(array.data, BYTE.as_pointer()), [builder.mul(panel, stride)])
        return builder.bitcast(start, array.data.type)


def _panel_product(num_tokens: int):  # numba's own typing takes its place
    """An intrinsic: sums[t, r] = Σ_c weights[panel, c, r] · x[first + t, c] for `num_tokens` tokens."""

    @intrinsic
    def product(typing_context, weights, scales, minima, panel, x, first, sums):  # noqa: ARG001
        signature = types.void(weights, scales, minima, types.intp, x, types.intp, sums)

        def generate(context, builder, signature, arguments):
            x_array = context.make_array(signature.args[4])(context, builder, arguments[4])
            num_columns = cgutils.unpack_tuple(builder, x_array.shape)[1]
            emitter = _PanelEmitter(builder, num_tokens)
            tokens = [builder.add(arguments[5], ir.Constant(INT64, t)) for t in range(num_tokens)]
            x_rows = [builder.gep(x_array.data, [builder.mul(token, num_columns)]) for token in tokens]
            panel = _Panel(context, builder, signature, arguments)
            emitter.for_each_column(panel, num_columns, lambda w, column: emitter.add_column(w, x_rows, column))
            sums = context.make_array(signature.args[6])(context, builder, arguments[6]).data
            for t, total in enumerate(emitter.sums):
                emitter.store(builder.load(total), builder.gep(sums, [ir.Constant(INT64, t * PANEL_ROWS)]))
            return context.get_dummy_value()

        return signature, generate

    return product


_product_1, _product_2, _product_3 = _panel_product(1), _panel_product(2), _panel_product(3)
_product_4, _product_5, _product_6 = _panel_product(4), _panel_product(5), _panel_product(6)


@intrinsic
def _unpack(typing_context, weights, scales, minima, panel, num_columns, out):  # noqa: ARG001
    """Write a panel to `out` [1, K, R] as float32."""
    signature = types.void(weights, scales, minima, types.intp, types.intp, out)

    def generate(context, builder, signature, arguments):
        target = context.make_array(signature.args[5])(context, builder, arguments[5]).data
        emitter = _PanelEmitter(builder, 0)
        panel = _Panel(context, builder, signature, arguments)
        emitter.for_each_column(
            panel,
            arguments[4],
            lambda w, column: emitter.store(w, emitter.offset(target, emitter.times(column, PANEL_ROWS))),
        )
        return context.get_dummy_value()

    return signature, generate


@njit(inline="always")
def _activate(x, activation):
    if activation == SILU:
        return x / (np.float32(1.0) + exp(-x))
    if activation == GELU:
        return np.float32(0.5) * x * np.float32(1.0 + math.erf(x * 0.7071067811865476))
    inner = np.float32(0.7978845608028654) * (x + np.float32(0.044715) * x * x * x)
    return x / (np.float32(1.0) + exp(np.float32(-2.0) * inner))  # 0.5 · (1 + tanh(y)) = 1 / (1 + e^(-2y))


@njit(inline="always")
def _product(weights, scales, minima, panel, x, first, num_tokens, sums):
    if num_tokens == 6:
        _product_6(weights, scales, minima, panel, x, first, sums)
    elif num_tokens == 1:
        _product_1(weights, scales, minima, panel, x, first, sums)
    elif num_tokens == 2:
        _product_2(weights, scales, minima, panel, x, first, sums)
    elif num_tokens == 3:
        _product_3(weights, scales, minima, panel, x, first, sums)
    elif num_tokens == 4:
        _product_4(weights, scales, minima, panel, x, first, sums)
    else:
        _product_5(weights, scales, minima, panel, x, first, sums)


@njit(inline="always")
def _write_tile(sums, num_tokens, first, panel, bias, out, activation):
    """Put a tile of sums where it belongs. With an activation, rows 0..7 of a panel are gates of rows 8..15."""
    half = PANEL_ROWS // 2
    row = panel * PANEL_ROWS
    if len(bias):
        for t in range(num_tokens):
            for r in range(PANEL_ROWS):
                sums[t * PANEL_ROWS + r] += bias[row + r]
    if activation == NO_ACTIVATION:
        width = min(PANEL_ROWS, out.shape[1] - row)
        for t in range(num_tokens):
            for r in range(width):
                out[first + t, row + r] = sums[t * PANEL_ROWS + r]
    else:
        width = min(half, out.shape[1] - panel * half)
        for t in range(num_tokens):
            for r in range(width):
                gate, up = sums[t * PANEL_ROWS + r], sums[t * PANEL_ROWS + half + r]
                out[first + t, panel * half + r] = _activate(gate, activation) * up


@njit(parallel=True, fastmath=True, nogil=True, cache=True)
def linear(x, weight, bias, out, activation, num_threads):
    """out = x · Wᵀ + bias, or out = activation(gate) · up for a weight packed by `pack_gated`.

    Args:
        x: [T, K] float32, contiguous.
        weight: (weights, scales, minima) of a `PackedWeight`.
        bias: [P · R] float32 in the weight's row order, or empty.
        out: [T, N] float32, N rows or pairs of rows; overwritten.
        activation: NO_ACTIVATION, SILU, GELU or GELU_TANH.
        num_threads: numba threads to use.
    """
    weights, scales, minima = weight
    num_panels, num_tokens = weights.shape[0], x.shape[0]
    # Unpacking costs about as much as a tile, so a few tokens take their weights straight from the packed form.
    unpack_first = weights.itemsize == 1 and num_tokens > 2 * TOKENS_PER_TILE
    per_thread = (num_panels + num_threads - 1) // num_threads
    for thread in prange(num_threads):
        sums = np.empty(TOKENS_PER_TILE * PANEL_ROWS, np.float32)
        unpacked = np.empty((1, x.shape[1] if unpack_first else 0, PANEL_ROWS), np.float32)
        for panel in range(thread * per_thread, min(num_panels, (thread + 1) * per_thread)):
            if unpack_first:
                _unpack(weights, scales, minima, panel, x.shape[1], unpacked)
            for first in range(0, num_tokens, TOKENS_PER_TILE):
                tile = min(TOKENS_PER_TILE, num_tokens - first)
                if unpack_first:
                    _product(unpacked, scales, minima, 0, x, first, tile, sums)
                else:
                    _product(weights, scales, minima, panel, x, first, tile, sums)
                _write_tile(sums, tile, first, panel, bias, out, activation)
