"""GPTQ (Frantar et al. 2023): rounds column by column, and lets the columns that follow make up for each error."""

from typing import NamedTuple

import torch

from stellarbyte.compress.errors import CompressError
from stellarbyte.compress.quantization.grid import Grid, Levels

# N outputs, K inputs, G groups of S inputs

DAMPING = 0.01  # λ as a share of the mean of H's diagonal
_COLUMNS_AT_ONCE = 128  # whose errors reach the columns after them in one product


class Rounded(NamedTuple):
    """Codes [N, K] and levels [N, G], in float32."""

    codes: torch.Tensor
    levels: Levels


def gptq(
    weight_NK: torch.Tensor, gram_KK: torch.Tensor, grid: Grid, *, act_order: bool = False, keeps_zeros: bool = False
) -> Rounded:
    """Codes that nearly minimise ‖(W - Ŵ) X‖² for the inputs of the Gram matrix X Xᵀ, with H = X Xᵀ + λ I.

    Args:
        act_order: begin with the inputs of the largest H_kk, and fit all levels before; otherwise columns go in order,
            and a group's levels are fitted to its weights when their turn comes.
        keeps_zeros: weights that are 0 stay 0, as in a pruned matrix.

    Raises:
        CompressError: H is singular.
    """
    num_inputs, size = weight_NK.shape[1], grid.group_size
    order = torch.arange(num_inputs)
    if act_order:
        order = gram_KK.diagonal().argsort(descending=True, stable=True)
    factor_KK = _inverse_factor(gram_KK[order][:, order])
    left_NK, levels = weight_NK.float()[:, order].clone(), grid.fit(weight_NK.float())
    is_zero_NK = weight_NK[:, order] == 0
    codes_NK = torch.empty_like(left_NK)
    scales, zeros = levels.scales.clone(), levels.zeros.clone()
    for start in range(0, num_inputs, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, num_inputs)
        errors = torch.empty(len(left_NK), stop - start)
        for column in range(start, stop):
            group = int(order[column]) // size
            if not act_order and column % size == 0:
                fitted = grid.fit(left_NK[:, column : column + size])
                scales[:, group], zeros[:, group] = fitted.scales[:, 0], fitted.zeros[:, 0]
            weight_N, scale_N, zero_N = left_NK[:, column], scales[:, group], zeros[:, group]
            code_N = grid.codes_at(weight_N, scale_N, zero_N)
            if keeps_zeros:
                code_N = torch.where(is_zero_NK[:, column], zero_N, code_N)
            codes_NK[:, column] = code_N
            error_N = (weight_N - (code_N - zero_N) * scale_N) / factor_KK[column, column]
            errors[:, column - start] = error_N
            left_NK[:, column + 1 : stop] -= torch.outer(error_N, factor_KK[column, column + 1 : stop])
        left_NK[:, stop:] -= errors @ factor_KK[start:stop, stop:]
    return Rounded(codes_NK[:, order.argsort()], Levels(scales, zeros))


def _inverse_factor(gram_KK: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of H⁻¹, float32."""
    gram_KK = gram_KK.double()
    damping = DAMPING * gram_KK.diagonal().mean()
    damped_KK = gram_KK + damping * torch.eye(len(gram_KK), dtype=torch.float64)
    lower_KK, failed = torch.linalg.cholesky_ex(damped_KK)
    if failed or not lower_KK.isfinite().all():
        raise CompressError(
            f"the Hessian of its {len(gram_KK)} inputs is singular with λ = {damping:.3g} ({DAMPING:.0%} of the mean "
            "diagonal): the calibration text gives it no input, or numbers that are not finite."
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower_KK), upper=True).float()
