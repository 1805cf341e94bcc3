"""Rounding one matrix: grids against the CPU kernels, GPTQ against float64 code from its formulas."""

import numpy as np
import pytest
import torch

from stellarbyte.backends.cpu_matrices import _kernel_rows
from stellarbyte.checkpoint.quantized.matrix import Kind
from stellarbyte.compress.errors import CompressError
from stellarbyte.compress.quantization.gptq import DAMPING, gptq
from stellarbyte.compress.quantization.grid import GROUPS, Grid
from stellarbyte.compress.quantization.rounding import round_matrix
from stellarbyte.compress.quantization.settings import Quantization
from stellarbyte.compress.quantization.statistics import InputStatistics, product_errors
from stellarbyte.ops.cpu.linear import INT4_GROUP, INT8_GROUP
from stellarbyte.ops.cpu.packing import panels_of, unpack

KINDS: tuple[Kind, ...] = ("int4", "int8", "fp8")


def random_inputs(num_inputs: int, seed: int = 0, rows: int = 600) -> torch.Tensor:
    """[T, K] correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_inputs, num_inputs, generator=generator) / num_inputs**0.5
    x = torch.randn(rows, num_inputs, generator=generator) @ (mixing + 0.3 * torch.eye(num_inputs))
    return x * torch.logspace(-1, 1, num_inputs)[torch.randperm(num_inputs, generator=generator)]


def random_weight(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5


def statistics(x: torch.Tensor) -> InputStatistics:
    inputs = InputStatistics(x.shape[1])
    for part in x.split(97):
        inputs.add(part)
    return inputs


@pytest.mark.parametrize("kind", KINDS)
def test_the_cpu_kernels_multiply_with_the_fitted_numbers(kind: Kind) -> None:
    assert GROUPS == {"int4": INT4_GROUP, "int8": INT8_GROUP, "fp8": INT8_GROUP}
    grid, weight = Grid(kind=kind), random_weight(32, 128)
    weight[3, 32:64] = 0
    weight[4, :32] = weight[4, :32].abs() + 0.1  # a group without a sign change
    levels = grid.fit(weight)
    numbers = grid.round(weight, levels)
    stored = grid.stored(grid.codes(weight, levels), levels)
    assert torch.equal(stored.dequantized(), numbers)
    np.testing.assert_allclose(unpack(panels_of(_kernel_rows(stored))), numbers.numpy(), rtol=3e-7, atol=1e-8)
    step = levels.scales.repeat_interleave(grid.group_size, 1)
    gap = (weight - numbers).abs()
    if kind == "fp8":
        assert (gap <= weight.abs() / 16 + step / 512 + 1e-7).all()  # three bits of mantissa, subnormals below
    else:  # half a step; a step where the zero point and the scale are rounded at the edge of a group
        assert (gap <= step * 1.01).all() and (gap <= step * 0.501).float().mean() > 0.98
    assert torch.equal(numbers[3, 32:64], torch.zeros(32))


def naive_gptq(weight: np.ndarray, gram: np.ndarray, grid: Grid, order: np.ndarray, *, is_static: bool) -> np.ndarray:
    """Equations 2 and 3 of the paper in float64: after each column, the inverse loses its row and column."""
    weight, size = weight.copy(), grid.group_size
    inverse = np.linalg.inv(gram + DAMPING * np.diag(gram).mean() * np.eye(len(gram)))
    levels = grid.fit(torch.from_numpy(weight).float())
    scales, zeros = levels.scales.double().numpy(), levels.zeros.double().numpy()
    numbers = np.zeros_like(weight)
    left = list(order)
    for column in order:
        group = column // size
        if not is_static and column % size == 0:
            fitted = grid.fit(torch.from_numpy(weight[:, column : column + size]).float())
            scales[:, group], zeros[:, group] = fitted.scales[:, 0].numpy(), fitted.zeros[:, 0].numpy()
        scale, zero = scales[:, group], zeros[:, group]
        codes = np.clip(np.rint(weight[:, column] / scale) + zero, 0, 15)
        numbers[:, column] = (codes - zero) * scale
        error = (weight[:, column] - numbers[:, column]) / inverse[column, column]
        left.remove(column)
        weight[:, left] -= np.outer(error, inverse[column, left])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return numbers


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_the_papers_formula(act_order: bool) -> None:
    """160 columns: more than are worked on at once. A tie may round either way, and changes what follows in its row."""
    grid, weight = Grid(kind="int4"), random_weight(24, 160)
    gram = statistics(random_inputs(160)).gram_KK
    order = np.argsort(-gram.diagonal().numpy(), kind="stable") if act_order else np.arange(160)
    expected = naive_gptq(weight.double().numpy(), gram.numpy(), grid, order, is_static=act_order)
    found = grid.numbers(*gptq(weight, gram, grid, act_order=act_order)).numpy()
    same_rows = np.isclose(found, expected, rtol=1e-3, atol=1e-4).all(axis=1)
    assert same_rows.mean() >= 0.8
    errors = [product_errors(weight - torch.from_numpy(numbers), gram) for numbers in (found, expected)]
    torch.testing.assert_close(errors[0].sum(), errors[1].sum(), rtol=0.02, atol=0)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [600, 20])  # fewer than inputs: the damping makes the Hessian regular
def test_no_error_is_larger_than_that_of_rounding(method: str, kind: Kind, rows: int) -> None:
    """Computed here from the inputs themselves, in float64."""
    x, weight = random_inputs(128, rows=rows), random_weight(48, 128)
    grid = Grid(kind=kind)
    rounded = round_matrix("w", weight, statistics(x), grid, Quantization(method=method, kind=kind))  # type: ignore[arg-type]
    assert torch.equal(rounded.stored.dequantized(), rounded.numbers_NK)

    def error(numbers: torch.Tensor) -> torch.Tensor:
        return ((weight - numbers).double() @ x.double().T).square().sum(dim=1)

    nearest = error(grid.round(weight, grid.fit(weight)))
    found = error(rounded.numbers_NK)
    assert (found <= nearest * (1 + 1e-6)).all()
    if kind != "fp8":
        assert found.sum() < (0.75 if method == "gptq" else 1) * nearest.sum()
    whole = (weight.double() @ x.double().T).square().sum()
    assert rounded.report.error == pytest.approx(float(found.sum() / whole), rel=1e-4)
    assert rounded.report.error_of_rounding == pytest.approx(float(nearest.sum() / whole), rel=1e-4)


def test_weights_that_were_pruned_stay_zero() -> None:
    weight = random_weight(16, 96)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.5] = 0
    inputs = statistics(random_inputs(96))
    for keeps_zeros in (True, False):
        settings = Quantization(method="gptq", keeps_zeros=keeps_zeros)
        numbers = round_matrix("w", weight, inputs, Grid(kind="int4"), settings).numbers_NK
        assert bool((numbers[weight == 0] == 0).all()) is keeps_zeros


@pytest.mark.parametrize("numbers", [0.0, float("nan")])
def test_a_singular_hessian_is_named(numbers: float) -> None:
    inputs = InputStatistics(64)
    inputs.add(torch.full((8, 64), numbers))
    with pytest.raises(CompressError, match=r"^layer\.w: the Hessian of its 64 inputs is singular with λ = "):
        round_matrix("layer.w", random_weight(4, 64), inputs, Grid(kind="int4"), Quantization(method="gptq"))


def test_what_does_not_fit_a_grid_is_named() -> None:
    with pytest.raises(CompressError, match=r"layer\.w has 48 inputs; int4 needs a multiple of 32, its group"):
        round_matrix("layer.w", random_weight(4, 48), None, Grid(kind="int4"), Quantization(method="round"))
    with pytest.raises(CompressError, match=r"too large for scales of torch\.float16"):
        Grid(kind="int8").fit(torch.full((1, 64), 1e8))
    for fields, told in (({"act_order": True}, "act-order"), ({"strength": 0.5}, "strength is a setting")):
        with pytest.raises(CompressError, match=told):
            Quantization(method="awq", **fields)
    with pytest.raises(CompressError, match="must be from 0 to 1"):
        Quantization(method="smoothquant", strength=1.5)
