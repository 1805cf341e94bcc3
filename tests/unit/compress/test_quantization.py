"""Rounding one matrix: grids against the CPU kernels, GPTQ against float64 code from its formulas."""

import numpy as np
import pytest
import torch

from stellarbyte.backends.cpu_matrices import _kernel_rows
from stellarbyte.checkpoint.quantized.matrix import Kind
from stellarbyte.compress.errors import CompressError
from stellarbyte.compress.quantization.gptq import DAMPING, Rounded, compensated, descended, rescaled
from stellarbyte.compress.quantization.grid import GROUPS, Grid, Levels
from stellarbyte.compress.quantization.rounding import round_matrix
from stellarbyte.compress.quantization.settings import Quantization
from stellarbyte.compress.quantization.statistics import InputStatistics, product_errors
from stellarbyte.ops.cpu.packing import panels_of, unpack
from stellarbyte.ops.cpu.panels.sizes import INT4_GROUP, INT8_GROUP
from stellarbyte.ops.triton.grouped.weights import grouped, takes

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


def naive_gptq(weight: np.ndarray, hessian: np.ndarray, grid: Grid, levels: Levels) -> np.ndarray:
    """Equations 2 and 3 of the paper in float64: after each column, the inverse loses its row and column."""
    weight, size = weight.copy(), grid.group_size
    inverse = np.linalg.inv(hessian)
    scales, zeros = levels.scales.double().numpy(), levels.zeros.double().numpy()
    numbers = np.zeros_like(weight)
    order = np.argsort(-np.diag(hessian), kind="stable")
    left = list(order)
    for column in order:
        scale, zero = scales[:, column // size], zeros[:, column // size]
        codes = np.clip(np.rint(weight[:, column] / scale) + zero, 0, 15)
        numbers[:, column] = (codes - zero) * scale
        error = (weight[:, column] - numbers[:, column]) / inverse[column, column]
        left.remove(column)
        weight[:, left] -= np.outer(error, inverse[column, left])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return numbers


def hessian_of(num_inputs: int) -> torch.Tensor:
    gram = statistics(random_inputs(num_inputs)).gram_KK
    return gram + DAMPING * gram.diagonal().mean() * torch.eye(num_inputs, dtype=torch.float64)


def test_gptq_is_the_papers_formula() -> None:
    """160 columns: more than are worked on at once. A tie may round either way, and changes what follows in its row."""
    grid, weight, hessian = Grid(kind="int4"), random_weight(24, 160), hessian_of(160)
    levels = grid.fit(weight)
    expected = naive_gptq(weight.double().numpy(), hessian.numpy(), grid, levels)
    found = grid.numbers(compensated(weight, hessian, grid, levels, None), levels).numpy()
    same_rows = np.isclose(found, expected, rtol=1e-3, atol=1e-4).all(axis=1)
    assert same_rows.mean() >= 0.8
    errors = [product_errors(weight - torch.from_numpy(numbers), hessian) for numbers in (found, expected)]
    torch.testing.assert_close(errors[0].sum(), errors[1].sum(), rtol=0.02, atol=0)


def test_real_zero_points_keep_the_range_of_a_group() -> None:
    """Numbers on a grid with a minimum of its own, as GGUF's Q4_1 has it, are kept; integer zero points move them."""
    numbers = np.random.default_rng(0)
    codes, minima = numbers.integers(0, 16, (24, 4, 32)), numbers.uniform(-2, -0.3, (24, 4, 1))
    codes[..., :2] = 0, 15
    weight = torch.from_numpy((codes * 0.0625 + minima).astype(np.float32)).flatten(1)
    weight[5, 32:64], weight[6, :32] = 0, 3.25  # groups of one number
    grid, integer = Grid(kind="int4", zero_points="real"), Grid(kind="int4")
    levels = grid.fit(weight)
    found = grid.round(weight, levels)
    assert (found - weight).abs().max() <= 0.0625 * 2**-7  # zero points of up to 32 steps, 11 bits
    assert (integer.round(weight, integer.fit(weight)) - weight).abs().max() > 0.02
    stored = grid.stored(grid.codes(weight, levels), levels)
    assert stored.zeros is not None and stored.zeros.dtype == torch.float16
    assert torch.equal(stored.dequantized(), found)
    np.testing.assert_allclose(unpack(panels_of(_kernel_rows(stored)))[:24], found.numpy(), rtol=3e-6, atol=3e-6)
    assert takes(stored) and torch.equal(grouped([stored]).dequantized(), found)


@pytest.mark.parametrize("kind", KINDS)
def test_descent_takes_the_best_number_of_each_column_in_turn(kind: Kind) -> None:
    """More columns than are worked on at once. The oracle tries, in float64, every number that the format has."""
    grid, hessian = Grid(kind=kind), hessian_of(192)
    weight = random_weight(6, 192)
    levels = grid.fit(weight)
    codes = grid.codes(weight, levels)
    found = descended(weight, hessian.float(), grid, Rounded(codes, levels), None)

    expected, exact = codes.clone(), hessian / hessian.diagonal().mean()
    numbers_of = {
        "int4": torch.arange(16.0),
        "int8": torch.arange(-127.0, 128.0),
        "fp8": torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float(),
    }[kind]
    every = numbers_of[numbers_of.isfinite()]
    for column in range(192):
        scale, zero = (level[:, column // grid.group_size] for level in levels)
        gap = weight.double() - grid.numbers(expected, levels).double()
        gap_at = weight[:, column, None].double() - (every[None] - zero[:, None]).double() * scale[:, None].double()
        pull = gap @ exact[:, column] - gap[:, column] * exact[column, column]  # of the other columns
        errors = exact[column, column] * gap_at.square() + 2 * gap_at * pull[:, None]
        expected[:, column] = every[errors.argmin(dim=1)]
    is_same = (grid.numbers(found, levels) - grid.numbers(expected, levels)).abs() < 1e-6
    assert is_same.all(dim=1).float().mean() >= 0.8, "but for ties"
    before, after = (product_errors(weight - grid.numbers(each, levels), hessian) for each in (codes, found))
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < 0.8 * before.sum()


def test_rescaling_is_the_least_squares_of_each_group_in_turn() -> None:
    grid, weight, hessian = Grid(kind="int4", scale_dtype=torch.float32), random_weight(8, 96), hessian_of(96)
    levels = grid.fit(weight, 0.9)
    codes = grid.codes(weight, levels)
    found = rescaled(weight, hessian.float(), grid, Rounded(codes, levels))

    root, scales = torch.linalg.cholesky(hessian), levels.scales.double()  # ‖gap · root‖² = gap · H · gap
    steps = (grid.groups(codes) - levels.zeros[..., None]).double()
    for group in range(3):
        columns = slice(32 * group, 32 * group + 32)
        numbers = (steps * scales[..., None]).flatten(1)
        numbers[:, columns] = 0
        for row in range(8):
            basis, target = steps[row, group] @ root[columns], (weight[row].double() - numbers[row]) @ root
            scales[row, group] = torch.linalg.lstsq(basis[:, None], target[:, None]).solution[0, 0]
    torch.testing.assert_close(found.scales.double(), scales, rtol=1e-3, atol=0)
    assert torch.equal(found.zeros, levels.zeros)


def test_scale_and_real_zero_point_are_the_least_squares_of_each_group_in_turn() -> None:
    grid, weight = Grid(kind="int4", scale_dtype=torch.float32, zero_points="real"), random_weight(8, 96) + 0.1
    hessian = hessian_of(96)
    levels = grid.fit(weight, 0.8)
    codes = grid.codes(weight, levels)
    found = rescaled(weight, hessian.float(), grid, Rounded(codes, levels))

    root, numbers = torch.linalg.cholesky(hessian), grid.numbers(codes, levels).double()
    for group in range(3):
        columns = slice(32 * group, 32 * group + 32)
        numbers[:, columns] = 0
        for row in range(8):
            code = codes[row, columns].double()
            basis = torch.stack([code, torch.ones(32, dtype=torch.float64)]) @ root[columns]
            target = (weight[row].double() - numbers[row]) @ root
            scale, minimum = torch.linalg.lstsq(basis.T, target[:, None]).solution[:, 0]
            numbers[row, columns] = code * scale + minimum
    torch.testing.assert_close(grid.numbers(codes, found).double(), numbers, rtol=0, atol=2e-3)
    errors = [product_errors(weight - each, hessian).sum() for each in (grid.numbers(codes, levels), numbers)]
    assert product_errors(weight - grid.numbers(codes, found), hessian).sum() < errors[1] * 1.01 < errors[0]


@pytest.mark.parametrize(("mean", "size"), [(1.0, 1e-3), (0.5, 0.3), (0.0, 2e-4)])
def test_rounding_what_is_stored_makes_no_group_worse(mean: float, size: float) -> None:
    """A zero point far from its codes has few bits for the minimum, and a tiny scale is stored larger."""
    grid, hessian = Grid(kind="int4", zero_points="real"), hessian_of(64)
    weight = mean + size * random_weight(32, 64) * 8
    levels = grid.fit(weight)
    codes = grid.codes(weight, levels)
    found = rescaled(weight, hessian.float(), grid, Rounded(codes, levels))
    before, after = (product_errors(weight - grid.numbers(codes, each), hessian) for each in (levels, found))
    assert (after <= before * (1 + 1e-4)).all() and after.sum() < before.sum()


def test_clipped_levels_are_the_best_of_all_that_are_tried() -> None:
    """Real levels whose zero points lie between two codes: a shift and a share of the range must both be found."""
    grid, weight = Grid(kind="int4"), random_weight(16, 64) + 0.05
    gram = statistics(random_inputs(64)).gram_KK

    def own_errors(levels: Levels) -> torch.Tensor:
        gap = (weight - grid.round(weight, levels)).double()
        return torch.stack([product_errors(gap[:, at], gram[at, at]) for at in (slice(0, 32), slice(32, 64))], dim=1)

    found = own_errors(grid.fit_clipped(weight, gram))
    for shrink in (1.04, 1.0, 0.9, 0.8):
        levels = grid.fit(weight, shrink)
        for shift in (-1, 0, 1):
            tried = own_errors(Levels(levels.scales, (levels.zeros + shift).clamp(0, 15)))
            assert (found <= tried * (1 + 1e-5)).all()
    assert found.sum() < 0.9 * own_errors(grid.fit(weight)).sum()


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
    with pytest.raises(CompressError, match=r"^layer\.w: the Hessian of its 64 inputs is singular, although "):
        round_matrix("layer.w", random_weight(4, 64), inputs, Grid(kind="int4"), Quantization(method="gptq"))


def test_what_does_not_fit_a_grid_is_named() -> None:
    with pytest.raises(CompressError, match=r"layer\.w has 48 inputs; int4 needs a multiple of 32, its group"):
        round_matrix("layer.w", random_weight(4, 48), None, Grid(kind="int4"), Quantization(method="round"))
    with pytest.raises(CompressError, match=r"too large for scales of torch\.float16"):
        Grid(kind="int8").fit(torch.full((1, 64), 1e8))
    with pytest.raises(CompressError, match=r"zero points \(real\) are a setting of int4, not of fp8"):
        Quantization(method="gptq", kind="fp8", zero_points="real")
    with pytest.raises(CompressError, match="cannot keep the zeros of pruned weights"):
        Quantization(method="gptq", keeps_zeros=True, zero_points="real")
    with pytest.raises(CompressError, match="strength is a setting"):
        Quantization(method="awq", strength=0.5)
    with pytest.raises(CompressError, match="must be from 0 to 1"):
        Quantization(method="smoothquant", strength=1.5)
