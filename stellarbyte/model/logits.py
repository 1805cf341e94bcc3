"""From products of the language-model head to logits: their factor and their soft cap."""

import torch


def finish_logits(products: torch.Tensor, multiplier: float, softcap: float | None) -> torch.Tensor:
    """c · tanh(m · W x / c) of the products W x, with the factor m and the cap c; no cap: m · W x."""
    logits = products if multiplier == 1 else products * multiplier
    return logits if softcap is None else soft_cap(logits, softcap)


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap · tanh(x / cap) (Bello et al. 2016): near x where x is small, never beyond ±cap."""
    return cap * torch.tanh(x / cap)
