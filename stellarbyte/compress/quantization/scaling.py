"""The factors of AWQ (Lin et al. 2024) and SmoothQuant (Xiao et al. 2023) for the inputs of linears."""

import torch

from stellarbyte.compress.quantization.folding import Fold
from stellarbyte.compress.quantization.grid import Grid
from stellarbyte.compress.quantization.statistics import InputStatistics, product_errors

# N outputs, K inputs

_EXPONENTS = tuple(step / 20 for step in range(20))  # α that AWQ tries; 0: no factors
_SMALLEST = 1e-4  # of inputs and factors


def awq_factors(fold: Fold, inputs: InputStatistics, grid: Grid) -> torch.Tensor:
    """s = (mean |x|)^α, [K] float32, with the α that changes the products least when W · s is rounded.

    The change is ‖(W - round(W · s) / s) X‖² over all linears that read the input. Factors are divided by the geometric
    mean of their largest and smallest. α = 0 is among those tried, so the result is no worse than without factors.
    """
    weight_NK = torch.cat([linear.weight.data.float() for linear in fold.linears])
    mean_K = inputs.mean_K.clamp(min=_SMALLEST)
    best_K, least = torch.ones_like(mean_K), torch.inf
    for exponent in _EXPONENTS:
        factors_K = fold.tie(mean_K**exponent).clamp(min=_SMALLEST)
        factors_K = factors_K / (factors_K.max() * factors_K.min()).sqrt()
        scaled_NK = weight_NK * factors_K
        gap_NK = weight_NK - grid.round(scaled_NK, grid.fit(scaled_NK)) / factors_K
        error = float(product_errors(gap_NK, inputs.gram_KK).sum())
        if error < least:
            best_K, least = factors_K, error
    return best_K


def smoothquant_factors(fold: Fold, inputs: InputStatistics, strength: float) -> torch.Tensor:
    """s = max|x|^strength / max|w|^(1 - strength), [K] float32: the range of inputs moves into weights."""
    largest_K = torch.cat([linear.weight.data.float().abs() for linear in fold.linears]).amax(dim=0)
    of_inputs_K = inputs.largest_K.clamp(min=_SMALLEST) ** strength
    return fold.tie(of_inputs_K / largest_K.clamp(min=_SMALLEST) ** (1 - strength)).clamp(min=_SMALLEST)
