"""Products of packed panels with tokens, in the way of the weights' kind. In compiled code only."""

from numba import types
from numba.extending import overload

from stellarbyte.ops.cpu.panels.floats import fp8_product
from stellarbyte.ops.cpu.panels.integers import encode_rows, integer_product

INTEGERS = (types.int32, types.uint32)  # words of int8 and of int4
_FEW = 12  # tokens: to unpack a panel of fp8 costs as much as their products


def most_packed(weights):
    """For how many tokens at most `packed_product` is used; for more, panels are unpacked first."""
    raise NotImplementedError


@overload(most_packed)
def _most_packed(weights):
    number = {types.float32: 0, types.uint8: _FEW}.get(weights.dtype, 2**62)

    def most(weights):
        return number

    return most


def packed_rows(x, weight, starts, num_threads):
    """Rows of x as `packed_product` takes them; it is given tiles of the parts that begin at `starts`."""
    raise NotImplementedError


@overload(packed_rows)
def _packed_rows(x, weight, starts, num_threads):
    def encoded(x, weight, starts, num_threads):
        weights, scales, _ = weight
        return encode_rows(x, weights, scales.shape[1], starts, num_threads)

    def as_they_are(x, weight, starts, num_threads):
        return x

    return encoded if weight[0].dtype in INTEGERS else as_they_are


def packed_product(weight, panel, rows, first, num_tokens, sums, is_invariant):
    """sums = a panel's products with rows of `packed_rows`, as many as a `tile_size`; `is_invariant`: in the same order
    for any."""
    raise NotImplementedError


@overload(packed_product)
def _packed_product(weight, panel, rows, first, num_tokens, sums, is_invariant):
    def of_integers(weight, panel, rows, first, num_tokens, sums, is_invariant):
        weights, scales, minima = weight
        integer_product(weights, scales, minima, panel, rows, first, num_tokens, sums)

    def of_fp8(weight, panel, rows, first, num_tokens, sums, is_invariant):
        weights, scales, minima = weight
        fp8_product(weights, scales, minima, panel, rows, first, num_tokens, sums, is_invariant)

    def of_float32(weight, panel, rows, first, num_tokens, sums, is_invariant):
        raise ValueError("never called: `most_packed` of float32 is 0")

    if weight[0].dtype == types.float32:
        return of_float32
    return of_integers if weight[0].dtype in INTEGERS else of_fp8
