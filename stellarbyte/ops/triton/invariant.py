"""Linear layers of any number of rows, each with the same bits wherever it stands and whatever the others are.

The order of a sum depends on the tile and on who computes it, so there is one tile for one row and for thousands, and
one program adds all inputs of an output, from the first to the last. `linear` and cuBLAS choose by the number of rows.
"""

import torch
import triton
import triton.language as tl

from stellarbyte.ops.triton.linear import finish
from stellarbyte.ops.triton.overlap import overlapping, wait_for_inputs
from stellarbyte.ops.triton.weights import Weight

# T rows, N outputs, K inputs

_ROWS = 64
_BLOCK_N = 64
_BYTES_K = 256  # of a row, for each step: as many inputs as fit
_NUM_WARPS = 4
_NUM_STAGES = 3


def invariant_linear(x_TK: torch.Tensor, weight: Weight, out_TN: torch.Tensor | None = None) -> torch.Tensor:
    """W · x + bias for any number of contiguous rows, float32 or bfloat16; in `out_TN` if given.

    Quantized weights are multiplied in the dtype of x, and their sums scaled.
    """
    num_rows, num_inputs = x_TK.shape
    num_outputs = weight.num_outputs
    if out_TN is None:
        out_TN = x_TK.new_empty(num_rows, num_outputs)
    if not num_rows:
        return out_TN
    block_k = min(_BYTES_K // x_TK.element_size(), max(16, triton.next_power_of_2(num_inputs)))
    _invariant_kernel[(triton.cdiv(num_outputs, _BLOCK_N), triton.cdiv(num_rows, _ROWS))](
        x_TK,
        weight.matrix_NK,
        x_TK if weight.scales_N is None else weight.scales_N,
        x_TK if weight.bias_N is None else weight.bias_N,
        out_TN,
        num_rows,
        num_outputs,
        num_inputs,
        ROWS=_ROWS,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=block_k,
        NUM_TILES=triton.cdiv(num_inputs, block_k),
        EVEN_K=num_inputs % block_k == 0,
        HAS_SCALES=weight.scales_N is not None,
        HAS_BIAS=weight.bias_N is not None,
        num_warps=_NUM_WARPS,
        num_stages=_NUM_STAGES,
        **overlapping(x_TK.device),
    )
    return out_TN


# Not specialised on the number of rows: a kernel compiled for one row could add in another order.
@triton.jit(do_not_specialize=["num_rows"])
def _invariant_kernel(
    x, weight, scales, bias, out, num_rows, num_outputs, num_inputs, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, NUM_TILES: tl.constexpr, EVEN_K: tl.constexpr, HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """A tile of outputs and rows; the weights are the wide operand of the matrix units."""
    element = out.dtype.element_ty
    wait_for_inputs(OVERLAPS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside_n, inside_t = n < num_outputs, t < num_rows
    w_row = weight + n.to(tl.int64)[:, None] * num_inputs
    x_row = x + t.to(tl.int64)[None, :] * num_inputs
    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for i in range(NUM_TILES):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_w, mask_x = inside_n[:, None], inside_t[None, :]
        if not EVEN_K:
            mask_w, mask_x = mask_w & (k < num_inputs)[None, :], mask_x & (k < num_inputs)[:, None]
        w = tl.load(w_row + k[None, :], mask=mask_w, other=0.0).to(element)
        v = tl.load(x_row + k[:, None], mask=mask_x, other=0.0)
        total = tl.dot(w, v, total, input_precision="ieee")
    many_n = n[:, None] + tl.zeros([1, ROWS], tl.int32)
    offsets, inside = t.to(tl.int64)[None, :] * num_outputs + many_n, inside_n[:, None] & inside_t[None, :]
    finish(
        total, total, total, out, scales, bias, bias, offsets, many_n, num_outputs, inside,
        HAS_SCALES, HAS_BIAS, False, False, 0,
    )  # fmt: skip
