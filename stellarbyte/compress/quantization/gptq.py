"""GPTQ (Frantar et al. 2023): rounds column by column, and lets the columns that follow make up for each error.

Levels are fitted before, and columns of large inputs go first. The codes are then improved one by one (QuantEase,
Behdin et al. 2023), and the scales between.
"""

from typing import NamedTuple

import torch

from stellarbyte.compress.errors import CompressError
from stellarbyte.compress.quantization.grid import Grid, Levels

# N outputs, K inputs, G groups of S inputs, H the Hessian X Xᵀ + λ I [K, K]

DAMPING = 0.01  # λ as a share of the mean of the diagonal of X Xᵀ
ROUNDS = 2  # of descent: codes twice, then scales
_COLUMNS_AT_ONCE = 128  # whose errors reach the columns after them in one product


class Rounded(NamedTuple):
    """Codes [N, K] and levels [N, G], in float32."""

    codes: torch.Tensor
    levels: Levels


def gptq(weight_NK: torch.Tensor, gram_KK: torch.Tensor, grid: Grid, *, keeps_zeros: bool = False) -> Rounded:
    """Codes and levels that nearly minimise tr((W - Ŵ) H (W - Ŵ)ᵀ) for the inputs of the Gram matrix X Xᵀ.

    Args:
        keeps_zeros: weights that are 0 stay 0, as in a pruned matrix.

    Raises:
        CompressError: H is singular.
    """
    weight_NK = weight_NK.float()
    hessian_KK = _damped(gram_KK)
    levels = grid.fit_clipped(weight_NK, hessian_KK)
    is_zero_NK = weight_NK == 0 if keeps_zeros else None
    codes_NK = compensated(weight_NK, hessian_KK, grid, levels, is_zero_NK)
    hessian_KK = (hessian_KK / hessian_KK.diagonal().mean()).float()
    for _ in range(ROUNDS):
        for _ in range(2):
            codes_NK = descended(weight_NK, hessian_KK, grid, Rounded(codes_NK, levels), is_zero_NK)
        levels = rescaled(weight_NK, hessian_KK, grid, Rounded(codes_NK, levels))
    return Rounded(codes_NK, levels)


def compensated(
    weight_NK: torch.Tensor, hessian_KK: torch.Tensor, grid: Grid, levels: Levels, is_zero_NK: torch.Tensor | None
) -> torch.Tensor:
    """The codes [N, K] of GPTQ for fixed levels, in the order of falling H_kk.

    Args:
        hessian_KK: float64.
        is_zero_NK: weights that stay 0.
    """
    order = hessian_KK.diagonal().argsort(descending=True, stable=True)
    factor_KK = _inverse_factor(hessian_KK[order][:, order])
    left_NK = weight_NK[:, order]  # a copy
    codes_NK = torch.empty_like(left_NK)
    for start in range(0, len(order), _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, len(order))
        errors = torch.empty(len(left_NK), stop - start)
        for column in range(start, stop):
            input_ = int(order[column])
            scale_N, zero_N = _of_column(grid, levels, input_)
            code_N = grid.codes_at(left_NK[:, column], scale_N, zero_N)
            if is_zero_NK is not None:
                code_N = torch.where(is_zero_NK[:, input_], zero_N, code_N)
            codes_NK[:, input_] = code_N
            error_N = (left_NK[:, column] - (code_N - zero_N) * scale_N) / factor_KK[column, column]
            errors[:, column - start] = error_N
            left_NK[:, column + 1 : stop] -= torch.outer(error_N, factor_KK[column, column + 1 : stop])
        left_NK[:, stop:] -= errors @ factor_KK[start:stop, stop:]
    return codes_NK


def descended(
    weight_NK: torch.Tensor, hessian_KK: torch.Tensor, grid: Grid, rounded: Rounded, is_zero_NK: torch.Tensor | None
) -> torch.Tensor:
    """Codes [N, K] after each column has taken those that are best while all other columns stay as they are.

    Column k of Ŵ moves to the numbers nearest to ŵ_k + ((W - Ŵ) H)_k / H_kk; the error never grows.

    Args:
        hessian_KK: float32.
    """
    codes_NK, levels = rounded
    numbers_NK, codes_NK = grid.numbers(codes_NK, levels), codes_NK.clone()
    gradient_NK = (weight_NK - numbers_NK) @ hessian_KK
    for start in range(0, weight_NK.shape[1], _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, weight_NK.shape[1])
        moves = torch.zeros(len(weight_NK), stop - start)
        for column in range(start, stop):
            scale_N, zero_N = _of_column(grid, levels, column)
            pull_N = gradient_NK[:, column] - moves[:, : column - start] @ hessian_KK[start:column, column]
            code_N = grid.codes_at(numbers_NK[:, column] + pull_N / hessian_KK[column, column], scale_N, zero_N)
            if is_zero_NK is not None:
                code_N = torch.where(is_zero_NK[:, column], zero_N, code_N)
            codes_NK[:, column] = code_N
            moves[:, column - start] = (code_N - zero_N) * scale_N - numbers_NK[:, column]
        gradient_NK -= moves @ hessian_KK[start:stop]
    return codes_NK


def rescaled(weight_NK: torch.Tensor, hessian_KK: torch.Tensor, grid: Grid, rounded: Rounded) -> Levels:
    """Levels that are, group after group, the best for the codes while all other groups stay as they are.

    Zero points move with the scales where they are real.

    Args:
        hessian_KK: float32.
    """
    if grid.zero_points == "real" and grid.kind == "int4":
        return _rescaled_and_moved(weight_NK, hessian_KK, grid, rounded)
    codes_NK, levels = rounded
    size = grid.group_size
    steps = grid.groups(codes_NK) - levels.zeros[..., None]
    gradient_NK = (weight_NK - grid.numbers(codes_NK, levels)) @ hessian_KK
    scales = levels.scales.clone()
    for group in range(scales.shape[1]):
        columns = slice(group * size, (group + 1) * size)
        steps_NS, hessian_SK = steps[:, group], hessian_KK[columns]
        slope_N = (steps_NS * gradient_NK[:, columns]).sum(dim=1)
        curvature_N = ((steps_NS @ hessian_SK[:, columns]) * steps_NS).sum(dim=1)
        best_N = scales[:, group] + torch.where(curvature_N > 0, slope_N / curvature_N, 0.0)
        stored_N = grid.stored_scales(best_N)
        gradient_NK -= ((stored_N - scales[:, group])[:, None] * steps_NS) @ hessian_SK
        scales[:, group] = stored_N
    return Levels(scales, levels.zeros)


def _rescaled_and_moved(weight_NK: torch.Tensor, hessian_KK: torch.Tensor, grid: Grid, rounded: Rounded) -> Levels:
    """Numbers are code · scale + minimum: the two best of a group solve two equations."""
    codes_NK, levels = rounded
    size, steps_NGS = grid.group_size, grid.groups(codes_NK)
    gradient_NK = (weight_NK - grid.numbers(codes_NK, levels)) @ hessian_KK
    scales, zeros = levels.scales.clone(), levels.zeros.clone()
    for group in range(scales.shape[1]):
        columns = slice(group * size, (group + 1) * size)
        basis_N2S = torch.stack([steps_NGS[:, group], torch.ones_like(steps_NGS[:, group])], dim=1)
        curvature_N22 = (basis_N2S @ hessian_KK[columns, columns]) @ basis_N2S.mT
        slope_N2 = (basis_N2S @ gradient_NK[:, columns, None])[..., 0]
        damping = 1e-6 * curvature_N22.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=1e-12)
        moves_N2 = torch.linalg.solve(curvature_N22 + damping[:, None, None] * torch.eye(2), slope_N2)
        scale_N = grid.stored_scales(scales[:, group] + moves_N2[:, 0])
        minimum_N = moves_N2[:, 1] - zeros[:, group] * scales[:, group]
        zero_N = grid.stored_zeros(-minimum_N / scale_N)
        moved_NS = (steps_NGS[:, group] - zero_N[:, None]) * scale_N[:, None]
        moved_NS -= (steps_NGS[:, group] - zeros[:, group, None]) * scales[:, group, None]
        change_N = ((moved_NS @ hessian_KK[columns, columns] - 2 * gradient_NK[:, columns]) * moved_NS).sum(dim=1)
        is_better_N = change_N < 0  # what is stored is rounded, which may make it worse
        gradient_NK -= torch.where(is_better_N[:, None], moved_NS, 0.0) @ hessian_KK[columns]
        scales[:, group] = torch.where(is_better_N, scale_N, scales[:, group])
        zeros[:, group] = torch.where(is_better_N, zero_N, zeros[:, group])
    return Levels(scales, zeros)


def _of_column(grid: Grid, levels: Levels, column: int) -> tuple[torch.Tensor, torch.Tensor]:
    group = column // grid.group_size
    return levels.scales[:, group], levels.zeros[:, group]


def _damped(gram_KK: torch.Tensor) -> torch.Tensor:
    """H, float64."""
    gram_KK = gram_KK.double()
    return gram_KK + DAMPING * gram_KK.diagonal().mean() * torch.eye(len(gram_KK), dtype=torch.float64)


def _inverse_factor(hessian_KK: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of H⁻¹, float32."""
    lower_KK, failed = torch.linalg.cholesky_ex(hessian_KK)
    if failed or not lower_KK.isfinite().all():
        raise CompressError(
            f"the Hessian of its {len(hessian_KK)} inputs is singular, although {DAMPING:.0%} of the mean diagonal was "
            "added: the calibration text gives it no input, or numbers that are not finite."
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower_KK), upper=True).float()
