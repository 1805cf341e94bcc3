"""Products by the matrix unit against float64; the splitting of numbers against torch's bfloat16."""

import numpy as np
import pytest
import torch
from numba import njit

from stellarbyte.backends import cpu_model
from stellarbyte.backends.cpu_model import CpuModel
from stellarbyte.ops.cpu.linear import (
    ACTIVATIONS,
    INVARIANT,
    MIN_TILED_TOKENS,
    NO_ACTIVATION,
    PLAIN,
    TILED,
    linear,
)
from stellarbyte.ops.cpu.packing import interleave_gated, pack, unpack
from stellarbyte.ops.cpu.panels.tiles import may_use_tiles, split_panel, split_row
from tests.support.models.byte_transformer import make_model

NOTHING, NO_ADDEND = np.zeros(0, np.float32), np.zeros((0, 0), np.float32)
# Of Σ |x · w|: both numbers keep 16 bits after the leading one, and the product of their low parts is left out.
ERROR = 2.0**-15

needs_unit = pytest.mark.skipif(not may_use_tiles(), reason="needs an x86 processor with AMX that Linux lets us use")


def random_arrays(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    numbers = np.random.default_rng(sum(map(sum, shapes)))
    return [numbers.standard_normal(shape, dtype=np.float32) for shape in shapes]


@needs_unit
@pytest.mark.parametrize("quantization", ["none", "int8", "fp8", "int4"])
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (70, 192), (5, 128)])
@pytest.mark.parametrize("tokens", [32, 33, 48, 63, 100])
def test_products_are_those_of_float64(tokens: int, rows: int, columns: int, quantization: str) -> None:
    x, w, bias, addend = random_arrays((tokens, columns), (rows, columns), (rows + -rows % 16,), (tokens, 80))
    weight = pack(w, quantization)
    out = np.full((tokens, rows), np.nan, np.float32)
    linear(x, tuple(weight), bias, addend, out, NO_ACTIVATION, TILED, 2)
    numbers, wide = unpack(weight)[:rows].astype(np.float64), x.astype(np.float64)
    expected = wide @ numbers.T + bias[:rows] + addend[:, :rows]
    gap = np.abs(out - expected)
    assert (gap <= ERROR * (np.abs(wide) @ np.abs(numbers).T) + 1e-6).all()
    assert gap.mean() < 2e-5 * np.abs(expected).mean(), "far below bfloat16's 4e-3"
    assert (out != 0).all()


@needs_unit
@pytest.mark.parametrize("activation", ACTIVATIONS.values())
def test_gated_products(activation: int) -> None:
    x, gate, up = random_arrays((MIN_TILED_TOKENS + 5, 96), (20, 96), (20, 96))
    found = []
    for arithmetic in (PLAIN, TILED):
        out = np.full((len(x), 20), np.nan, np.float32)
        linear(x, tuple(pack(interleave_gated(gate, up), "none")), NOTHING, NO_ADDEND, out, activation, arithmetic, 2)
        found.append(out)
    assert not np.array_equal(*found), "computed by the unit"
    np.testing.assert_allclose(*found, rtol=1e-3, atol=2e-3)


@needs_unit
def test_a_token_that_is_not_finite_changes_no_other() -> None:
    x, w = random_arrays((40, 64), (24, 64))
    found = []
    for row in (np.float32(0), np.float32("nan"), np.float32("inf")):
        x[7, 3] = row
        out = np.full((40, 24), 7, np.float32)
        linear(x, tuple(pack(w, "none")), NOTHING, NO_ADDEND, out, NO_ACTIVATION, TILED, 2)
        found.append(out)
    for out in found[1:]:
        assert not np.isfinite(out[7]).any()
        np.testing.assert_array_equal(np.delete(out, 7, 0), np.delete(found[0], 7, 0))


@njit
def _split(x, panel, blocks, panels):
    for t in range(len(x)):
        split_row(x, t, blocks, t // 16, t % 16)
    split_panel(panel, panels, 1)


def test_numbers_are_split_as_torch_rounds_them() -> None:
    x, panel = random_arrays((18, 64), (64, 16))
    x[0, :6] = [0.0, -0.0, 1.00390625, 1.01171875, -3e38, 1e-30]  # two ties: to the even neighbour below, and above
    x[1, :2] = np.array([0x7FFFFFFF, 0xFFFFE000], np.uint32).view(np.float32)  # NaN whose bits would overflow
    blocks, panels = np.zeros((2, 2, 2, 16, 32), np.uint16), np.zeros((2, 2, 2, 16, 16), np.uint32)
    _split(x, panel, blocks, panels)

    def halves(numbers: np.ndarray) -> list[np.ndarray]:
        whole = torch.from_numpy(numbers)
        high = whole.bfloat16()
        low = (whole - high.float()).bfloat16()
        return [part.view(torch.int16).numpy().view(np.uint16) for part in (high, low)]

    for part, expected in enumerate(halves(x)):
        rows = blocks[:, :, part].transpose(0, 2, 1, 3).reshape(32, 64)
        np.testing.assert_array_equal(rows[1, :2] & 0x7FC0, 0x7FC0)
        rows[1, :2] = expected[1, :2]  # NaN has no sign to agree on
        np.testing.assert_array_equal(rows[:18], expected)
        assert not rows[18:].any()
    assert not panels[0].any()
    for part, expected in enumerate(halves(panel)):
        pairs = panels[1, :, part].reshape(32, 16)
        np.testing.assert_array_equal(pairs & 0xFFFF, expected[0::2])
        np.testing.assert_array_equal(pairs >> 16, expected[1::2])


@pytest.mark.parametrize(("is_there", "is_invariant", "expected"), [
    (True, False, TILED), (False, False, PLAIN), (True, True, INVARIANT),
])  # fmt: skip
def test_the_unit_is_used_where_the_system_allows_it_but_not_for_invariant_numbers(
    is_there: bool, is_invariant: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_model, "may_use_tiles", lambda: is_there)
    model = make_model()
    served = CpuModel(model, model.config, quantization="none", num_threads=2, is_invariant=is_invariant)
    assert served.options.arithmetic == expected
