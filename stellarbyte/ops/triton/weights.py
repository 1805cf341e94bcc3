"""Weight matrices for the GPU's products, in the model's dtype or in 8 bits."""

from dataclasses import dataclass

import torch

# N outputs, K inputs


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A matrix [N, K], plain or quantized with one float32 scale for each output; the bias is in the model's dtype."""

    matrix_NK: torch.Tensor
    scales_N: torch.Tensor | None = None
    bias_N: torch.Tensor | None = None


def quantize(weight: Weight, quantization: str) -> Weight:
    """The same weight in 8 bits: "int8" or "fp8" (e4m3), scaled so that each output's largest number is the format's
    largest."""
    is_integer = quantization == "int8"
    largest = 127.0 if is_integer else torch.finfo(torch.float8_e4m3fn).max
    scales_N = weight.matrix_NK.abs().amax(dim=1).float().clamp(min=1e-30) / largest
    scaled_NK = weight.matrix_NK / scales_N[:, None]  # float32
    matrix_NK = scaled_NK.round().to(torch.int8) if is_integer else scaled_NK.to(torch.float8_e4m3fn)
    return Weight(matrix_NK=matrix_NK, scales_N=scales_N, bias_N=weight.bias_N)


def dequantized(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [N, K] in `dtype`, for products of many rows."""
    if weight.scales_N is None:
        return weight.matrix_NK
    return weight.matrix_NK.to(dtype) * weight.scales_N.to(dtype)[:, None]
