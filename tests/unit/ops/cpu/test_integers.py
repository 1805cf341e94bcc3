"""Products of int8 and int4 panels in integers: against float64, for every tile, and in every set of instructions."""

from typing import Any

import numpy as np
import pytest
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from stellarbyte.ops.cpu.instructions import BYTES, INTS, Emitter, host_has
from stellarbyte.ops.cpu.linear import INVARIANT, NO_ACTIVATION, PLAIN, linear
from stellarbyte.ops.cpu.packing import pack, unpack
from stellarbyte.ops.cpu.panels import integers
from stellarbyte.ops.cpu.panels.floats import unpack_panel
from stellarbyte.ops.cpu.panels.integers import encode_rows
from stellarbyte.ops.cpu.panels.sizes import INT4_GROUP, INT8_GROUP, tile_size

NOTHING, NO_ADDEND = np.zeros(0, np.float32), np.zeros((0, 0), np.float32)
GROUPS = {"int8": INT8_GROUP, "int4": INT4_GROUP}


def random_arrays(*shapes: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    numbers = np.random.default_rng(seed)
    return [numbers.standard_normal(shape, dtype=np.float32) for shape in shapes]


def product(x: np.ndarray, weight: Any, rows: int, arithmetic: Any = PLAIN) -> np.ndarray:
    out = np.full((len(x), rows), np.nan, np.float32)
    linear(x, tuple(weight), NOTHING, NO_ADDEND, out, NO_ACTIVATION, arithmetic, 2)
    return out


def largest_errors(x: np.ndarray, matrix: np.ndarray, group: int) -> np.ndarray:
    """What rounding each number of x by half a step of its group changes at most, and float32's own rounding."""
    steps = np.abs(x).reshape(len(x), -1, group).max(axis=-1) / 32767
    sums = np.abs(matrix).reshape(len(matrix), -1, group).sum(axis=-1)
    return 0.501 * steps.astype(np.float64) @ sums.T + 2e-6 * (np.abs(x).astype(np.float64) @ np.abs(matrix).T)


@pytest.mark.parametrize("quantization", GROUPS)
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (70, 192), (5, 128)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 20, 31])
def test_products_differ_from_float64_by_the_rounding_of_x(
    tokens: int, rows: int, columns: int, quantization: str
) -> None:
    x, w = random_arrays((tokens, columns), (rows, columns), seed=tokens)
    x[:, ::7] *= 300  # numbers beside which others are small
    weight = pack(w, quantization)
    matrix = unpack(weight)[:rows].astype(np.float64)
    gap = np.abs(product(x, weight, rows) - x.astype(np.float64) @ matrix.T)
    assert (gap <= largest_errors(x, matrix, GROUPS[quantization])).all()
    assert gap.max() > 0


@pytest.mark.parametrize("quantization", GROUPS)
def test_integers_are_multiplied_exactly(quantization: str) -> None:
    """Numbers that 16 bits hold, up to the largest, and every code."""
    numbers = np.random.default_rng(1)
    x = numbers.integers(-32767, 32768, (9, 64)).astype(np.float32)
    x[:, ::32] = 32767
    x[0], x[1] = 32767, -32767
    levels = 255 if quantization == "int8" else 16
    w = numbers.integers(0, levels, (32, 64)).astype(np.float32) - (levels // 2 if quantization == "int8" else 0)
    w[:, 0::32], w[:, 1::32] = w.min(), w.max()
    w[0], w[1] = w.max(), w.min()
    w[:2, 0], w[:2, 1] = w[0, 1], w[1, 1]
    weight = pack(w, quantization)
    np.testing.assert_array_equal(unpack(weight), w)
    exact = x.astype(np.float64) @ w.T
    np.testing.assert_allclose(product(x, weight, 32), exact, rtol=3e-7)


@pytest.mark.parametrize("quantization", GROUPS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_changes_no_other(quantization: str, value: float) -> None:
    x, w = random_arrays((13, 128), (24, 128))
    weight = pack(w, quantization)
    before = product(x, weight, 24)
    for column in (0, 77, 127):
        x_wrong = x.copy()
        x_wrong[7, column] = value
        found = product(x_wrong, weight, 24)
        assert not np.isfinite(found[7]).any()
        np.testing.assert_array_equal(np.delete(found, 7, 0), np.delete(before, 7, 0))


@pytest.mark.parametrize("quantization", GROUPS)
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-31, 1e-29, 1e30])
def test_groups_of_any_size(quantization: str, size: float) -> None:
    x, w = random_arrays((3, 128), (16, 128))
    x[:, 64:] *= np.float32(size)
    weight = pack(w, quantization)
    matrix = unpack(weight).astype(np.float64)
    gap = np.abs(product(x, weight, 16) - x.astype(np.float64) @ matrix.T)
    assert (gap <= largest_errors(x, matrix, GROUPS[quantization]) + 1e-28).all()


@pytest.mark.parametrize("quantization", GROUPS)
def test_a_row_has_the_same_bits_in_every_tile(quantization: str) -> None:
    x, w = random_arrays((41, 128), (40, 128))
    weight = pack(w, quantization)
    alone = np.concatenate([product(x[i : i + 1], weight, 40) for i in range(41)])
    for size in (2, 3, 7, 12, 13, 41):
        for arithmetic in (PLAIN, INVARIANT):
            np.testing.assert_array_equal(product(x[:size], weight, 40, arithmetic), alone[:size])


@pytest.mark.parametrize("parts", [[0, 5], [0, 1, 20, 20, 33], [0, 17, 40]])
@pytest.mark.parametrize(("quantization", "group"), GROUPS.items())
def test_rows_become_the_nearest_integers_side_by_side(quantization: str, group: int, parts: list[int]) -> None:
    """Of up to 16 rows one thread makes them, of more several."""
    (x,) = random_arrays((parts[-1], 128))
    x[2] = 0
    words = pack(np.zeros((16, 128), np.float32), quantization).weights
    num_groups = 128 // group
    codes, scales, sums = encode_rows(x, words, num_groups, np.array(parts), 2)
    steps = np.abs(x).reshape(len(x), num_groups, group).max(axis=-1) / 32767
    first = 0
    for end in parts[1:]:
        while first < end:
            size = tile_size(end - first)
            rows = slice(first, first + size)
            whole = codes[first * 64 : (first + size) * 64].reshape(64, size, 1).view(np.int16)
            whole = whole.transpose(1, 0, 2).reshape(size, num_groups, group)
            found, totals = (
                part[first * num_groups : (first + size) * num_groups].reshape(num_groups, size).T
                for part in (scales, sums)
            )
            np.testing.assert_allclose(found, np.maximum(steps[rows], 1e-30 / 32767), rtol=1e-6)
            assert np.abs(whole).max() <= 32767
            assert (np.abs(whole * found[..., None] - x[rows].reshape(whole.shape)) <= 0.501 * found[..., None]).all()
            np.testing.assert_allclose(totals, whole.sum(axis=-1) * found, rtol=1e-6)
            first += size


@njit
def _unpacked(weights: np.ndarray, scales: np.ndarray, minima: np.ndarray, out: np.ndarray) -> None:
    for panel in range(len(weights)):
        unpack_panel(weights, scales, minima, panel, out.shape[1], out, panel)


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_unpacked_panels_are_the_numbers_that_are_stored(quantization: str) -> None:
    """What the matrix unit multiplies."""
    (w,) = random_arrays((40, 192))
    weight = pack(w, quantization)
    out = np.full((3, 192, 16), np.nan, np.float32)
    _unpacked(*weight, out)
    np.testing.assert_allclose(out.transpose(0, 2, 1).reshape(48, 192), unpack(weight), rtol=3e-7, atol=5e-7)


@pytest.mark.parametrize("at_once", [0, 16, 32])
def test_pairs_are_multiplied_in_every_set_of_instructions(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """0: by LLVM's own choice for the machine, as on processors that are not x86."""
    if at_once and not host_has({16: "avx2", 32: "avx512bw"}[at_once]):
        pytest.skip(f"needs an x86 processor that multiplies {at_once} numbers of 16 bits at a time")
    monkeypatch.setattr(integers, "_SHORTS_AT_ONCE", at_once)

    @intrinsic
    def multiplied(_typing: Any, a: Any, b: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            data = [context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in range(3)]
            emitter, shorts = Emitter(builder), ir.VectorType(ir.IntType(16), 2 * BYTES.count)
            x, y = (emitter.load(pointer, shorts, 2) for pointer in data[:2])
            total = integers.add_pairs(emitter, emitter.load(data[2], INTS, 4), x, y)
            builder.store(total, builder.bitcast(data[2], INTS.as_pointer())).align = 4
            return context.get_dummy_value()

        return types.void(a, b, out), generate

    @njit
    def run(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        multiplied(a, b, out)

    numbers = np.random.default_rng(0)
    a, b = (numbers.integers(-32767, 32768, 32).astype(np.int16) for _ in range(2))
    out = numbers.integers(-1000, 1000, 16).astype(np.int32)
    a[:4] = [32767, -32767, 127, -127]
    expected = out + (a.astype(np.int64) * b).reshape(16, 2).sum(axis=-1)
    out[expected > 2**31 - 1] = 0
    expected = out + (a.astype(np.int64) * b).reshape(16, 2).sum(axis=-1)
    run(a, b, out)
    np.testing.assert_array_equal(out, expected)
