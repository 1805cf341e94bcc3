"""Weight matrices for the GPU's products, in the model's dtype or in 8 bits."""

from dataclasses import dataclass

import torch

# E experts, N outputs, K inputs


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A matrix [N, K], plain or quantized with one float32 scale for each output; the bias is in the model's dtype."""

    matrix_NK: torch.Tensor
    scales_N: torch.Tensor | None = None
    bias_N: torch.Tensor | None = None

    @property
    def num_outputs(self) -> int:
        return len(self.matrix_NK)

    @property
    def device(self) -> torch.device:
        return self.matrix_NK.device


@dataclass(frozen=True, kw_only=True)
class ExpertWeight:
    """The matrices of all experts, [E, N, K], plain or quantized with one float32 scale for each output; biases are in
    the model's dtype."""

    matrix_ENK: torch.Tensor
    scales_EN: torch.Tensor | None = None
    bias_EN: torch.Tensor | None = None


def quantize(weight: Weight, quantization: str) -> Weight:
    """The same weight in 8 bits: "int8" or "fp8" (e4m3), scaled so that each output's largest number is the format's
    largest."""
    matrix_NK, scales_N = _in_8_bits(weight.matrix_NK, quantization)
    return Weight(matrix_NK=matrix_NK, scales_N=scales_N, bias_N=weight.bias_N)


def quantize_experts(weight: ExpertWeight, quantization: str) -> ExpertWeight:
    """As `quantize`, for every expert."""
    matrices, scales = zip(*(_in_8_bits(matrix_NK, quantization) for matrix_NK in weight.matrix_ENK), strict=True)
    return ExpertWeight(matrix_ENK=torch.stack(matrices), scales_EN=torch.stack(scales), bias_EN=weight.bias_EN)


def _in_8_bits(matrix_NK: torch.Tensor, quantization: str) -> tuple[torch.Tensor, torch.Tensor]:
    is_integer = quantization == "int8"
    largest = 127.0 if is_integer else torch.finfo(torch.float8_e4m3fn).max
    scales_N = matrix_NK.abs().amax(dim=1).float().clamp(min=1e-30) / largest
    scaled_NK = matrix_NK / scales_N[:, None]  # float32
    return scaled_NK.round().to(torch.int8) if is_integer else scaled_NK.to(torch.float8_e4m3fn), scales_N


def dequantized(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [N, K] in `dtype`, for products of many rows."""
    if weight.scales_N is None:
        return weight.matrix_NK
    return weight.matrix_NK.to(dtype) * weight.scales_N.to(dtype)[:, None]
