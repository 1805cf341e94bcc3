"""Products of int8 and int4 panels with tokens, in integers.

Numbers of a token become integers of 16 bits that share a scale over the columns that share one in the weights: x ≈ s ·
q with s = max|x| / 32767. A product over these columns is then exact in 32 bits. Processors multiply twice as many such
integers as float32 numbers at a time, and codes of weights need no conversion. Rounding changes a number by at most
2^-16 of the largest beside it, far less than the weights were rounded by. A token's sums are in the same order, bit for
bit, whatever its tile is.

A lane of a vector of codes holds 32 bits of a row: 4 columns of int8, or 8 of int4. Shifts and masks make vectors of
pairs of adjacent columns of it, which one instruction multiplies by a token's pair and adds.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from stellarbyte.ops.cpu.instructions import FLOATS, INT32, INT64, INTS, LANES, Emitter, host_has
from stellarbyte.ops.cpu.panels.sizes import (
    INT4_GROUP,
    INT8_GROUP,
    LINES_AHEAD,
    PANEL_ROWS,
    TILE_SIZES,
    tile_size,
)

# T tokens, K columns, G groups of columns that share a scale, P panels of R rows

COLUMNS_OF_A_WORD = {types.int32: 4, types.uint32: 8}  # codes of int8 and int4
_GROUPS = {types.int32: INT8_GROUP, types.uint32: INT4_GROUP}
_MOST, _LEAST = 32767.0, 1e-30  # of a group whose numbers are all smaller than the latter, they become 0
_ALONE = 16  # tokens at most that one thread encodes, as waking others would take longer

_SHORT, _SHORTS = ir.IntType(16), ir.VectorType(ir.IntType(16), 2 * LANES)
_NO_INTEGERS = ir.Constant(INTS, [0] * LANES)
# x86's products of pairs, by the numbers that they take at a time.
_PAIR_PRODUCTS = {2 * LANES: "llvm.x86.avx512.pmaddw.d.512", LANES: "llvm.x86.avx2.pmadd.wd"}
_SHORTS_AT_ONCE = 2 * LANES if host_has("avx512bw") else LANES if host_has("avx2") else 0


def code_pairs(emitter: Emitter, words: ir.Value, *, is_signed: bool) -> list[ir.Value]:
    """A vector of words as vectors of 16 bits, a pair of columns for each row: two of int8 (signed), four of int4."""
    builder, halves = emitter.builder, emitter.builder.bitcast(words, _SHORTS)

    def every(number: int) -> ir.Constant:
        return ir.Constant(_SHORTS, [number] * (2 * LANES))

    if is_signed:
        return [builder.ashr(builder.shl(halves, every(8)), every(8)), builder.ashr(halves, every(8))]
    shifted = [builder.lshr(halves, every(bits)) for bits in (0, 4, 8)]
    return [*(builder.and_(numbers, every(15)) for numbers in shifted), builder.lshr(halves, every(12))]


def add_pairs(emitter: Emitter, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """total[r] + a[2r] · b[2r] + a[2r + 1] · b[2r + 1], numbers of 16 bits in sums of 32."""
    builder, size = emitter.builder, _SHORTS_AT_ONCE
    if not size:
        wide = ir.VectorType(INT32, 2 * LANES)
        products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
        even, odd = (emitter.lanes(products, products, [*range(i, 2 * LANES, 2)]) for i in (0, 1))
        return builder.add(total, builder.add(even, odd))
    numbers = ir.VectorType(_SHORT, size)
    kind = ir.FunctionType(ir.VectorType(INT32, size // 2), [numbers, numbers])
    function = cgutils.get_or_insert_function(builder.module, kind, _PAIR_PRODUCTS[size])
    parts = [
        builder.call(function, [emitter.lanes(x, x, [*range(first, first + size)]) for x in (a, b)])
        for first in range(0, 2 * LANES, size)
    ]
    sums = parts[0] if len(parts) == 1 else emitter.lanes(parts[0], parts[1], [*range(LANES)])
    return builder.add(total, sums)


def _start(context, builder, signature, arguments, i: int, offset: ir.Value) -> ir.Value:
    """Pointer to number `offset` of array argument i."""
    return builder.gep(context.make_array(signature.args[i])(context, builder, arguments[i]).data, [offset])


def _product(num_tokens: int):  # numba's own typing takes its place
    """An intrinsic: sums[t, r] = Σ_c weights[panel, c, r] · x[first + t, c] for a tile of `num_tokens` tokens."""

    @intrinsic
    def product(typing_context, weights, scales, minima, panel, codes, x_scales, x_sums, first, sums):
        integer = types.intp
        signature = types.void(weights, scales, minima, integer, codes, x_scales, x_sums, integer, sums)

        def generate(context, builder, signature, arguments):
            emitter, is_signed = Emitter(builder), weights.dtype == types.int32
            words_of_group = _GROUPS[weights.dtype] // COLUMNS_OF_A_WORD[weights.dtype]
            scales = context.make_array(signature.args[1])(context, builder, arguments[1])
            num_groups = cgutils.unpack_tuple(builder, scales.shape)[1]
            groups_before = builder.mul(arguments[3], num_groups)
            tile_groups = builder.mul(arguments[7], num_groups)

            def start(i: int, offset: ir.Value) -> ir.Value:
                return _start(context, builder, signature, arguments, i, offset)

            own_words = start(0, emitter.times(groups_before, words_of_group * PANEL_ROWS))
            own_scales, own_minima = (start(i, emitter.times(groups_before, PANEL_ROWS)) for i in (1, 2))
            pairs_of_group = _GROUPS[weights.dtype] // 2
            x_pairs = start(4, emitter.times(tile_groups, pairs_of_group))
            x_scales, x_sums = (start(i, tile_groups) for i in (5, 6))
            totals = [emitter.zeros() for _ in range(num_tokens)]
            partial = [cgutils.alloca_once_value(builder, _NO_INTEGERS) for _ in totals]

            def numbers_of(pointer: ir.Value, place: ir.Value) -> list[ir.Value]:
                """The tile's numbers of a place, each in all lanes."""
                row = emitter.offset(pointer, emitter.times(place, num_tokens))
                numbers = (builder.load(emitter.offset(row, ir.Constant(INT64, t))) for t in range(num_tokens))
                return [emitter.splat(number) for number in numbers]

            def add_word(word: ir.Value) -> None:
                at = emitter.offset(own_words, emitter.times(word, PANEL_ROWS))
                emitter.prefetch(emitter.offset(at, ir.Constant(INT64, LINES_AHEAD * LANES)))
                pairs = code_pairs(emitter, emitter.load(at, INTS, 4), is_signed=is_signed)
                for i, codes in enumerate(pairs):
                    place = builder.add(emitter.times(word, len(pairs)), ir.Constant(INT64, i))
                    for total, number in zip(partial, numbers_of(x_pairs, place), strict=True):
                        both = builder.bitcast(number, _SHORTS)
                        builder.store(add_pairs(emitter, builder.load(total), codes, both), total)

            with cgutils.for_range(builder, num_groups) as groups:
                for total in partial:
                    builder.store(_NO_INTEGERS, total)
                with cgutils.for_range(builder, ir.Constant(INT64, words_of_group)) as words:
                    add_word(builder.add(emitter.times(groups.index, words_of_group), words.index))
                place = emitter.times(groups.index, PANEL_ROWS)
                scale = emitter.load(emitter.offset(own_scales, place), FLOATS, 4)
                for total, whole, number in zip(totals, partial, numbers_of(x_scales, groups.index), strict=True):
                    value = builder.sitofp(builder.load(whole), FLOATS)
                    value = emitter.multiply_add(value, builder.fmul(scale, number), builder.load(total))
                    builder.store(value, total)
                if not is_signed:
                    minimum = emitter.load(emitter.offset(own_minima, place), FLOATS, 4)
                    for total, number in zip(totals, numbers_of(x_sums, groups.index), strict=True):
                        builder.store(emitter.multiply_add(minimum, number, builder.load(total)), total)
            for t, total in enumerate(totals):
                emitter.store(builder.load(total), start(8, ir.Constant(INT64, t * PANEL_ROWS)))
            return context.get_dummy_value()

        return signature, generate

    return product


def _choice(sizes: tuple[int, ...]) -> Callable[..., Any]:
    """The product for a tile of one of `sizes`, as a chain of conditions."""
    size, product = sizes[0], _product(sizes[0])

    @njit(inline="always")
    def last(weights, scales, minima, panel, rows, first, num_tokens, sums):
        codes, x_scales, x_sums = rows
        product(weights, scales, minima, panel, codes, x_scales, x_sums, first, sums)

    if len(sizes) == 1:
        return last
    others = _choice(sizes[1:])

    @njit(inline="always")
    def choose(weights, scales, minima, panel, rows, first, num_tokens, sums):
        if num_tokens == size:
            codes, x_scales, x_sums = rows
            product(weights, scales, minima, panel, codes, x_scales, x_sums, first, sums)
        else:
            others(weights, scales, minima, panel, rows, first, num_tokens, sums)

    return choose


integer_product = _choice(TILE_SIZES)


@intrinsic
def _encode_group(typing_context, weights, row, group, codes, codes_start, x_scales, x_sums, place, stride):
    """Write a group of a row's numbers: pairs to codes[codes_start + i · stride], scale and sum to `place`."""
    integer = types.intp
    signature = types.void(weights, row, integer, codes, integer, x_scales, x_sums, integer, integer)
    size = _GROUPS[weights.dtype]

    def generate(context, builder, signature, arguments):
        emitter, stride = Emitter(builder), arguments[8]

        def every(number: float) -> ir.Constant:
            return ir.Constant(FLOATS, [number] * LANES)

        def start(i: int, offset: ir.Value) -> ir.Value:
            return _start(context, builder, signature, arguments, i, offset)

        first = start(1, emitter.times(arguments[2], size))
        vectors = [emitter.load(emitter.offset(first, ir.Constant(INT64, i)), FLOATS, 4) for i in range(0, size, LANES)]
        # Of numbers without sign the bits are in the same order, and NaN's are the largest, so that it is kept.
        largest = _NO_INTEGERS
        for numbers in vectors:
            bits = builder.and_(builder.bitcast(numbers, INTS), ir.Constant(INTS, [0x7FFFFFFF] * LANES))
            largest = builder.select(builder.icmp_signed(">", bits, largest), bits, largest)
        for distance in (8, 4, 2, 1):
            others = emitter.lanes(largest, largest, [(i + distance) % LANES for i in range(LANES)])
            largest = builder.select(builder.icmp_signed(">", others, largest), others, largest)
        most = builder.bitcast(largest, FLOATS)
        most = builder.select(builder.fcmp_ordered("<", most, every(_LEAST)), every(_LEAST), most)
        factor = builder.fdiv(every(_MOST), most)
        scale = builder.fdiv(most, every(_MOST))
        whole = _NO_INTEGERS
        half = LANES // 2
        for i, numbers in enumerate(vectors):
            rounded = builder.fptosi(emitter.call("rint", builder.fmul(numbers, factor)), INTS)
            whole = builder.add(whole, rounded)
            shorts = builder.trunc(rounded, ir.VectorType(_SHORT, LANES))
            pairs = builder.bitcast(shorts, ir.VectorType(INT32, half))
            for j in range(half):
                offset = builder.add(arguments[4], builder.mul(stride, ir.Constant(INT64, i * half + j)))
                builder.store(builder.extract_element(pairs, ir.Constant(INT32, j)), start(3, offset))
        for distance in (8, 4, 2, 1):
            whole = builder.add(whole, emitter.lanes(whole, whole, [(i + distance) % LANES for i in range(LANES)]))
        total = builder.fmul(builder.sitofp(whole, FLOATS), scale)
        for i, numbers in ((5, scale), (6, total)):
            builder.store(builder.extract_element(numbers, ir.Constant(INT32, 0)), start(i, arguments[7]))
        return context.get_dummy_value()

    return signature, generate


@njit(inline="always")
def _encode_tile(x, weights, num_groups, first, num_tokens, rows):
    codes, x_scales, x_sums = rows
    pairs = x.shape[1] // num_groups // 2
    for t in range(num_tokens):
        for group in range(num_groups):
            place = (first * num_groups + group * num_tokens) + t
            codes_start = (first * num_groups + group * num_tokens) * pairs + t
            _encode_group(weights, x[first + t], group, codes, codes_start, x_scales, x_sums, place, num_tokens)


@njit(nogil=True)
def _encode(x, weights, num_groups, starts, rows):
    for i in range(len(starts) - 1):
        first = starts[i]
        while first < starts[i + 1]:
            size = tile_size(starts[i + 1] - first)
            _encode_tile(x, weights, num_groups, first, size, rows)
            first += size


@njit(parallel=True, nogil=True)
def _encode_parallel(x, weights, num_groups, starts, rows, num_threads):
    for thread in prange(num_threads):
        turn = 0
        for i in range(len(starts) - 1):
            first = starts[i]
            while first < starts[i + 1]:
                size = tile_size(starts[i + 1] - first)
                if turn % num_threads == thread:
                    _encode_tile(x, weights, num_groups, first, size, rows)
                first += size
                turn += 1


@njit(nogil=True)
def encode_rows(x, weights, num_groups, starts, num_threads):
    """Rows of x as integers for `integer_product`, tile by tile: numbers of its tokens stand side by side.

    Args:
        x: [T, K] float32, contiguous.
        weights: the words that it is to be multiplied by.
        num_groups: G of the weights.
        starts: rows where parts begin that are divided into tiles, and T; no tile has rows of two parts.
        num_threads: numba threads to use.

    Returns:
        (codes [T · K/2] int32: pairs of 16 bits, scales [T · G], sums [T · G] of x over groups).
    """
    rows = (
        np.empty(len(x) * (x.shape[1] // 2), np.int32),
        np.empty(len(x) * num_groups, np.float32),
        np.empty(len(x) * num_groups, np.float32),
    )
    if len(x) > _ALONE:
        _encode_parallel(x, weights, num_groups, starts, rows, num_threads)
    else:
        _encode(x, weights, num_groups, starts, rows)
    return rows
