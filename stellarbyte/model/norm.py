"""Root mean square normalisation (Zhang & Sennrich 2019)."""

import torch
from torch import nn


class ByteRMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension; statistics in float32, result in x's dtype.

    `zero_centered`: · (1 + weight) instead, in float32.
    """

    def __init__(self, size: int, eps: float, *, zero_centered: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if zero_centered else torch.ones(size))
        self.eps = eps
        self.zero_centered = zero_centered

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.gain * normed).to(x.dtype) if self.zero_centered else self.weight * normed.to(x.dtype)

    @property
    def gain(self) -> torch.Tensor:
        """The factor of each channel: the weight, or 1 + weight in float32."""
        return 1.0 + self.weight.float() if self.zero_centered else self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"
