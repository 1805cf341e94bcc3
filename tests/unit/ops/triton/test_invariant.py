"""Rows of the GPU kernels for `--deterministic`, bit for bit: alone, in batches, and wherever they stand."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte.backends.gpu.products import PackedWeight, apply_invariant
from stellarbyte.checkpoint.quantized.matrix import QuantizedMatrix
from stellarbyte.compress.quantization.grid import Grid
from stellarbyte.ops.triton.grouped.weights import grouped
from stellarbyte.ops.triton.weights import Weight, dequantized, quantize
from tests.support.cases import SLOW_WITHOUT_GPU
from tests.support.triton_dots import placeless_dots

NUM_ROWS = 70  # more than a tile
BATCHES = (2, 3, 16, 17, 64, NUM_ROWS)


@pytest.fixture(autouse=True)
def dots():
    with placeless_dots():
        yield


def random(*shape: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def in_groups(matrix_NK: torch.Tensor) -> QuantizedMatrix:
    grid = Grid(kind="int4")
    levels = grid.fit(matrix_NK)
    return grid.stored(grid.codes(matrix_NK, levels), levels)


def weight_of(form: str, matrix_NK: torch.Tensor, bias_N: torch.Tensor) -> tuple[PackedWeight, torch.Tensor]:
    """And its numbers in float32."""
    if form == "int4":
        weight = grouped([in_groups(matrix_NK)], bias_N)
        return weight, weight.dequantized()
    plain = Weight(matrix_NK=matrix_NK, bias_N=bias_N)
    if form == "none":
        return plain, matrix_NK.float()
    quantized = quantize(plain, form)
    return quantized, dequantized(quantized, torch.float32)


@pytest.mark.parametrize("form", ["none", "int8", "fp8", "int4"])
@pytest.mark.parametrize("sizes", [(96, 160), pytest.param((37, 1504), marks=SLOW_WITHOUT_GPU)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_has_the_same_bits_in_every_batch(
    form: str, sizes: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    if dtype == torch.bfloat16 and form in ("int8", "int4") and device.type == "cpu":
        pytest.skip("Triton's interpreter makes no bfloat16 numbers of integers")
    num_outputs, num_inputs = sizes
    matrix = random(num_outputs, num_inputs, device=device, seed=1).to(dtype)
    x, bias = (
        random(NUM_ROWS, num_inputs, device=device).to(dtype),
        random(num_outputs, device=device, seed=2).to(dtype),
    )
    weight, numbers_NK = weight_of(form, matrix.float() if form == "int4" else matrix, bias)
    alone = torch.cat([apply_invariant(row, weight) for row in x.split(1)])
    expected = x.double() @ numbers_NK.double().T + bias.double()
    tolerance = {"atol": 2e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.2, "rtol": 2e-2}
    torch.testing.assert_close(alone.double(), expected, **tolerance)
    for count in BATCHES:
        for first in {0, (NUM_ROWS - count) // 2, NUM_ROWS - count}:
            rows = slice(first, first + count)
            assert torch.equal(apply_invariant(x[rows].contiguous(), weight), alone[rows]), (count, first)


def test_a_product_is_written_where_it_is_wanted(device: torch.device) -> None:
    x, matrix = random(5, 48, device=device), random(20, 48, device=device, seed=1)
    out = torch.full((5, 20), float("nan"), device=device)
    assert apply_invariant(x, Weight(matrix_NK=matrix), out) is out
    torch.testing.assert_close(out, x @ matrix.T, atol=2e-4, rtol=1e-5)
    assert apply_invariant(x[:0], Weight(matrix_NK=matrix)).shape == (0, 20)
