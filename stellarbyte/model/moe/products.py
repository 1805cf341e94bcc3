"""Products of rows with the matrix of their own expert, rows sorted by expert.

Where experts have many rows, each gets a product of its own, as a dense layer computes it; the host has to know the
number of its rows. Where they have few, `F.grouped_mm` computes all in one kernel and the host does not wait. Products
of their own are operators of torch with a gradient, so that a compiled graph holds them although their sizes are in a
tensor.
"""

from typing import Any

import torch
from torch.nn import functional as F

# N rows sorted by expert, E experts, K inputs, O outputs

MANY_ROWS = 2048  # of an expert, on average: its products then fill a GPU by themselves


def grouped_linear(
    x_NK: torch.Tensor, weight_EOK: torch.Tensor, counts_E: torch.Tensor, *, in_one_kernel: bool
) -> torch.Tensor:
    """[N, O] = x · weight[expert of the row]ᵀ, in the dtype of autocast where it is on.

    Args:
        counts_E: int64, the rows of each expert, N in all; on the host unless it is one kernel.
        in_one_kernel: by `F.grouped_mm`, for what `takes_grouped` allows.
    """
    dtype = product_dtype(x_NK)
    x_NK, weight_EOK = x_NK.to(dtype), weight_EOK.to(dtype)
    if in_one_kernel:
        return F.grouped_mm(x_NK, weight_EOK.transpose(1, 2), offs=counts_E.cumsum(0).to(torch.int32))
    product: torch.Tensor = linear_of_groups(x_NK, weight_EOK, counts_E)
    return product


def takes_grouped(x_NK: torch.Tensor, *stacks_EOK: torch.Tensor) -> bool:
    """Whether `F.grouped_mm` computes these products faster than one product for each expert: few rows in bfloat16, by
    autocast as well, on a CUDA device, all rows of a multiple of 16 bytes."""
    is_aligned = all(stack.shape[1] % 8 == 0 and stack.shape[2] % 8 == 0 for stack in stacks_EOK)
    has_few = len(x_NK) < MANY_ROWS * len(stacks_EOK[0])
    return x_NK.is_cuda and product_dtype(x_NK) == torch.bfloat16 and is_aligned and has_few


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which `F.linear` would compute a product of x; autocast knows none of the products here."""
    device = x.device.type
    is_cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else x.dtype


@torch.library.custom_op("stellarbyte::linear_of_groups", mutates_args=())
def linear_of_groups(x_NK: torch.Tensor, weight_EOK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """[N, O] = x · weight[expert of the row]ᵀ. `counts_E` is on the host."""
    out_NO = x_NK.new_empty(len(x_NK), weight_EOK.shape[1])
    sizes = counts_E.tolist()
    for own_NK, matrix_OK, own_NO in zip(x_NK.split(sizes), weight_EOK.unbind(), out_NO.split(sizes), strict=True):
        if len(own_NK):
            torch.mm(own_NK, matrix_OK.t(), out=own_NO)
    return out_NO


@linear_of_groups.register_fake
def _(x_NK: torch.Tensor, weight_EOK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    del counts_E
    return x_NK.new_empty(x_NK.shape[0], weight_EOK.shape[1])


@torch.library.custom_op("stellarbyte::outer_of_groups", mutates_args=())
def outer_of_groups(y_NO: torch.Tensor, x_NK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """[E, O, K] = yᵀ · x over the rows of each expert: the gradient of its matrix."""
    out_EOK = x_NK.new_empty(len(counts_E), y_NO.shape[1], x_NK.shape[1])
    sizes = counts_E.tolist()
    for own_NO, own_NK, own_OK in zip(y_NO.split(sizes), x_NK.split(sizes), out_EOK.unbind(), strict=True):
        if len(own_NK):
            torch.mm(own_NO.t(), own_NK, out=own_OK)
        else:
            own_OK.zero_()
    return out_EOK


@outer_of_groups.register_fake
def _(y_NO: torch.Tensor, x_NK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    return x_NK.new_empty(counts_E.shape[0], y_NO.shape[1], x_NK.shape[1])


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_NO: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
    x_NK, weight_EOK, counts_E = ctx.saved_tensors
    needs_x, needs_weight, _ = ctx.needs_input_grad
    grad_NK = linear_of_groups(grad_NO, weight_EOK.transpose(1, 2), counts_E) if needs_x else None
    return grad_NK, outer_of_groups(grad_NO, x_NK, counts_E) if needs_weight else None, None


linear_of_groups.register_autograd(_gradients, setup_context=_keep)
