"""DoRA's factors of rows (Liu et al. 2024), for serving: f = m / ‖W + scale · B A‖."""

import torch

# R rows of W that are changed at once

_NUMBERS_AT_ONCE = 2**24  # of W + scale · B A


def row_factors(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, magnitude: torch.Tensor
) -> torch.Tensor:
    """f [out] of one module, in float32.

    Args:
        weight: W [out, in], as the backend multiplies by it, on any device, where the norms are computed.
        a, b: A [r, in] and B [out, r], like the following and the result on the CPU.
        scale: alpha / r.
        magnitude: m [out].

    Raises:
        ZeroDivisionError: a row of W + scale · B A is zero.
    """
    a, b = (matrix.to(weight.device, torch.float32) for matrix in (a, b))
    norms_R = []
    for w_R, b_R in zip(*(matrix.split(max(1, _NUMBERS_AT_ONCE // a.shape[1])) for matrix in (weight, b)), strict=True):
        norms_R.append(torch.linalg.vector_norm(torch.addmm(w_R.float(), b_R, a, alpha=scale), dim=1))
    norms = torch.cat(norms_R).cpu()
    if not bool((norms > 0).all()):
        raise ZeroDivisionError("a row of W + scale · B A is zero")
    return magnitude.float() / norms
