"""DoRA's factors of rows (Liu et al. 2024), for serving: f = m / ‖W + scale · B A‖."""

import torch


def row_factors(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, magnitude: torch.Tensor
) -> torch.Tensor:
    """f [out] of one module, in float32.

    Args:
        weight: W [out, in], as the backend multiplies by it.
        a, b: A [r, in] and B [out, r].
        scale: alpha / r.
        magnitude: m [out].

    Raises:
        ZeroDivisionError: a row of W + scale · B A is zero.
    """
    changed = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)
    norms = torch.linalg.vector_norm(changed, dim=1)
    if not bool((norms > 0).all()):
        raise ZeroDivisionError("a row of W + scale · B A is zero")
    return magnitude.float() / norms
