"""Between tokens and pairs of a token and an expert: every token's row to its pairs, and the pairs' rows back.

Both are autograd functions, since the gradient of each is the other's kind of gather: every row is read where a table
says so and written once. The derivative of indexing would instead add rows into a tensor of zeros, on a GPU in any
order.
"""

from typing import Any

import torch
from torch.nn import functional as F

# T tokens, K most choices of a token, N pairs sorted by expert, C hidden size


def copied_to_pairs(x_TC: torch.Tensor, token_N: torch.Tensor, row_TK: torch.Tensor) -> torch.Tensor:
    """[N, C]: x of each pair's token. `row_TK`: the pair of each place of a token; N or more: the place is empty."""
    rows_NC: torch.Tensor = _CopiedToPairs.apply(x_TC, token_N, row_TK)
    return rows_NC


def weighted_sums(
    rows_NC: torch.Tensor, gates_TK: torch.Tensor, place_N: torch.Tensor, row_TK: torch.Tensor
) -> torch.Tensor:
    """[T, C] = Σ over a token's places of gate · row, in float32, rounded to the rows' dtype.

    Args:
        place_N: the place of each pair, counted over all tokens: t · K + k.
        row_TK: the pair of each place; N or more: the place is empty and adds nothing.
    """
    sums_TC: torch.Tensor = _WeightedSums.apply(rows_NC, gates_TK, place_N, row_TK)
    return sums_TC


class _CopiedToPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TC: torch.Tensor, token_N: torch.Tensor, row_TK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(row_TK)
        return x_TC.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, grad_NC: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        grad_NC, row_TK = _with_empty_row(grad_NC, row_TK)
        first_T, *others = row_TK.unbind(dim=1)
        sums_TC = grad_NC.index_select(0, first_T)
        if others:
            sums_TC = _wide(sums_TC)
        for row_T in others:
            sums_TC = sums_TC + grad_NC.index_select(0, row_T)
        return sums_TC.to(grad_NC.dtype), None, None


class _WeightedSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_NC: torch.Tensor, gates_TK: torch.Tensor, place_N: torch.Tensor, row_TK: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(rows_NC, gates_TK, place_N, row_TK)
        rows_NC, row_TK = _with_empty_row(rows_NC, row_TK)
        first_T, *others = row_TK.unbind(dim=1)
        sums_TC = rows_NC.index_select(0, first_T) * gates_TK[:, :1]  # float32, since the gates are
        for k, row_T in enumerate(others, start=1):
            sums_TC = sums_TC.addcmul(rows_NC.index_select(0, row_T), gates_TK[:, k : k + 1])
        return sums_TC.to(rows_NC.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        rows_NC, gates_TK, place_N, row_TK = ctx.saved_tensors
        num_pairs, num_places = len(rows_NC), row_TK.shape[1]
        grad_NC = grad_TC.index_select(0, place_N // num_places)
        of_gate_N = (_wide(grad_NC) * rows_NC).sum(dim=1).to(gates_TK.dtype)
        if num_pairs < row_TK.numel():
            of_gate_N, row_TK = F.pad(of_gate_N, (0, 1)), row_TK.clamp(max=num_pairs)
        gate_N1 = gates_TK.flatten().index_select(0, place_N)[:, None]
        return grad_NC.mul_(gate_N1), of_gate_N[row_TK], None, None  # rounded once, after the product in float32


def _with_empty_row(rows_NC: torch.Tensor, row_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A row of zeros after the others where a place is empty, to which the empty places point."""
    num_pairs = len(rows_NC)
    if num_pairs == row_TK.numel():
        return rows_NC, row_TK
    return F.pad(rows_NC, (0, 0, 0, 1)), row_TK.clamp(max=num_pairs)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or as it is if it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
