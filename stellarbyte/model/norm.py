"""Root mean square normalisation (Zhang & Sennrich 2019)."""

import torch
from torch import nn


class ByteRMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension; statistics in float32, result in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"
