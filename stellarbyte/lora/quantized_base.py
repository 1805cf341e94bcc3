"""Frozen linears with weights of 8 bits, so that the base of an adapter takes a quarter of its memory in training."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

GROUP = 64  # weights of a row with one scale


class FrozenInt8Linear(nn.Module):
    """y = Ŵ x + b with Ŵ = scale · q, q of 8 bits and one scale for each group of up to 64 weights of a row.

    The weight is no parameter: gradients go to x only. They are computed from q, so training keeps no dequantized
    weight.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        weight = linear.weight.detach()
        groups = F.pad(weight.float(), (0, -self.in_features % GROUP)).view(self.out_features, -1, GROUP)
        scales = groups.abs().amax(-1, keepdim=True).div(127).to(weight.dtype).float()
        codes = (groups / scales.where(scales > 0, 1.0)).round().clamp(-127, 127)
        self.codes: torch.Tensor
        self.scales: torch.Tensor
        self.register_buffer("codes", codes.view(self.out_features, -1)[:, : self.in_features].to(torch.int8))
        self.register_buffer("scales", scales.squeeze(-1).to(weight.dtype))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.train(linear.training)

    def dequantized(self) -> torch.Tensor:
        """Ŵ [out, in]."""
        return _dequantized(self.codes, self.scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _FrozenProduct.apply(x, self.codes, self.scales)
        return y if self.bias is None else y + self.bias


def _dequantized(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return codes.to(scales.dtype) * scales.repeat_interleave(GROUP, dim=1)[:, : codes.shape[1]]


class _FrozenProduct(torch.autograd.Function):
    """Ŵ x, whose gradient dequantizes again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(codes, scales)
        return F.linear(x, _dequantized(codes, scales).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        codes, scales = ctx.saved_tensors
        return grad @ _dequantized(codes, scales).to(grad.dtype), None, None
