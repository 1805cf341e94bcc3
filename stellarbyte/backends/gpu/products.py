"""Products with packed weights: the fastest kernels for the form of the weights and the number of rows, or one kernel
for any number of rows."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from stellarbyte.ops.triton.fp8 import product, takes_fp8
from stellarbyte.ops.triton.grouped.product import MAX_ROWS as MAX_GROUPED_ROWS
from stellarbyte.ops.triton.grouped.product import can_norm, dequantize, grouped_linear
from stellarbyte.ops.triton.grouped.rows import invariant_tile
from stellarbyte.ops.triton.grouped.weights import GroupedWeight
from stellarbyte.ops.triton.invariant import invariant_linear
from stellarbyte.ops.triton.linear import is_for_few as is_linear_for_few
from stellarbyte.ops.triton.linear import linear
from stellarbyte.ops.triton.weights import Weight, dequantized

# T rows, N outputs, K inputs

PackedWeight = Weight | GroupedWeight

_MAX_GATED_ROWS = 64  # more rows take too many registers


def is_for_few(x_TK: torch.Tensor, weight: PackedWeight) -> bool:
    """Whether `few` is fastest, which fuses what stands around the product."""
    if isinstance(weight, GroupedWeight):
        return len(x_TK) <= MAX_GROUPED_ROWS
    return is_linear_for_few(x_TK, weight)


def can_norm_few(x_TK: torch.Tensor, weight: PackedWeight) -> bool:
    """Whether `few` is fastest, a norm included."""
    if isinstance(weight, GroupedWeight):
        return can_norm(len(x_TK), weight)
    return len(x_TK) <= 1


def fuses_gate(x_TK: torch.Tensor, weight: PackedWeight) -> bool:
    """Whether `few` with a gate is faster than a product and a kernel of the gate."""
    if isinstance(weight, GroupedWeight):
        return len(x_TK) <= _MAX_GATED_ROWS
    return is_linear_for_few(x_TK, weight)


def few(x_TK: torch.Tensor, weight: PackedWeight, **around: Any) -> torch.Tensor:
    """`linear.linear`, with its arguments."""
    return (
        grouped_linear(x_TK, weight, **around) if isinstance(weight, GroupedWeight) else linear(x_TK, weight, **around)
    )


def apply(x_TK: torch.Tensor, weight: PackedWeight, out_TN: torch.Tensor | None = None) -> torch.Tensor:
    """W · x + bias for contiguous rows, in `out_TN` if given."""
    if is_for_few(x_TK, weight):
        return few(x_TK, weight, out_TN=out_TN)
    if isinstance(weight, GroupedWeight):
        matrix_NK = dequantize(weight, x_TK.dtype)
    elif takes_fp8(x_TK, weight):
        product_TN = product(x_TK, weight)
        return product_TN if out_TN is None else out_TN.copy_(product_TN)
    else:
        matrix_NK = dequantized(weight, x_TK.dtype)
    if out_TN is not None and weight.bias_N is None:
        return torch.mm(x_TK, matrix_NK.T, out=out_TN)
    product_TN = F.linear(x_TK, matrix_NK, weight.bias_N)
    return product_TN if out_TN is None else out_TN.copy_(product_TN)


def apply_invariant(x_TK: torch.Tensor, weight: PackedWeight, out_TN: torch.Tensor | None = None) -> torch.Tensor:
    """As `apply`; each row has the same bits among any number of rows."""
    if isinstance(weight, GroupedWeight):
        return grouped_linear(x_TK, weight, out_TN=out_TN, tile=invariant_tile(weight))
    return invariant_linear(x_TK, weight, out_TN)


def rows_of(weight: PackedWeight, rows: slice) -> torch.Tensor:
    """Some outputs of the matrix, in float32 if quantized."""
    if isinstance(weight, Weight) and weight.scales_N is None:
        return weight.matrix_NK[rows]
    if isinstance(weight, GroupedWeight):
        return weight.rows(rows).dequantized()
    assert weight.scales_N is not None
    return dequantized(Weight(matrix_NK=weight.matrix_NK[rows], scales_N=weight.scales_N[rows]), torch.float32)


def on_cpu(weight: PackedWeight) -> PackedWeight:
    """A copy there."""
    tensors: dict[str, Any] = {
        name: part.cpu() for name, part in vars(weight).items() if isinstance(part, torch.Tensor)
    }
    return dataclasses.replace(weight, **tensors)
