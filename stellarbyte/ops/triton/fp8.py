"""Products of many rows with fp8 weights: the rows are rounded to fp8, too, with a scale for each.

The matrix units multiply fp8 numbers twice as fast as bfloat16, and the weights need not be dequantized in memory.
docs/benchmarks.md states the loss of quality.
"""

import torch
import triton
import triton.language as tl

from stellarbyte.ops.triton.overlap import overlapping, wait_for_inputs
from stellarbyte.ops.triton.weights import Weight

# T rows, N outputs, K inputs

LARGEST = tl.constexpr(torch.finfo(torch.float8_e4m3fn).max)


def takes_fp8(x_TK: torch.Tensor, weight: Weight) -> bool:
    """Whether `product` supports these: the requirements of torch's product with a scale for each row."""
    return (
        weight.matrix_NK.dtype == torch.float8_e4m3fn
        and x_TK.dtype == torch.bfloat16
        and x_TK.is_cuda
        and torch.cuda.get_device_capability(x_TK.device) >= (9, 0)
        and all(size % 16 == 0 for size in weight.matrix_NK.shape)
    )


def product(x_TK: torch.Tensor, weight: Weight) -> torch.Tensor:
    """W · x + bias for contiguous rows that `takes_fp8` accepts."""
    assert weight.scales_N is not None
    rows_TK, scales_T1 = quantize_rows(x_TK)
    out_TN = torch._scaled_mm(
        rows_TK, weight.matrix_NK.t(), scales_T1, weight.scales_N[None], out_dtype=x_TK.dtype, use_fast_accum=True
    )
    return out_TN if weight.bias_N is None else out_TN.add_(weight.bias_N)


def quantize_rows(x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows in fp8, scaled so that the largest number of each is fp8's largest, and their float32 scales [T, 1]."""
    num_rows, width = x_TK.shape
    rows_TK = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=x_TK.device)
    scales_T1 = torch.empty(num_rows, 1, dtype=torch.float32, device=x_TK.device)
    _quantize_kernel[(num_rows,)](
        x_TK, rows_TK, scales_T1, width, BLOCK=triton.next_power_of_2(width), num_warps=4 if width <= 4096 else 8,
        **overlapping(x_TK.device),
    )  # fmt: skip
    return rows_TK, scales_T1


@triton.jit
def _quantize_kernel(x, out, scales, width, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_inputs(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    numbers = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(numbers), axis=0), 1e-30) / LARGEST
    tl.store(scales + row, scale)
    tl.store(out + row * width + column, (numbers / scale).to(out.dtype.element_ty), mask=inside)
