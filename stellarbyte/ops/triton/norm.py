"""The residual stream on the GPU: add a branch, norm the sum, in one pass."""

import torch
import triton
import triton.language as tl

from stellarbyte.ops.triton.lora import Addend
from stellarbyte.ops.triton.overlap import overlapping, wait_for_inputs

# T tokens, C hidden size


def add_norm(
    x_TC: torch.Tensor,
    branch_TC: torch.Tensor | None,
    norm_C: torch.Tensor,
    eps: float,
    *,
    branch_scale_C: torch.Tensor | None = None,
    branch_norm_C: torch.Tensor | None = None,
    alpha: float | None = None,
    addend: Addend | None = None,
    counts_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """x += scale · branch, in place; returns RMSNorm(x), statistics in float32.

    With `alpha` (DeepNorm): x = RMSNorm(alpha · x + scale · branch), in place; returns x. Without a branch x does not
    change. `addend` is added to the branch, before the RMSNorm of the branch, if `branch_norm_C` is given. A branch of
    T · J rows is the sum of each row's J terms. `counts_E` is set to 0, which ends a layer of experts.
    """
    normed_TC = x_TC if alpha is not None else torch.empty_like(x_TC)
    _launch(x_TC, branch_TC, norm_C, normed_TC, eps, branch_scale_C, branch_norm_C, alpha, addend, counts_E)
    return normed_TC


def add_branch(
    x_TC: torch.Tensor,
    branch_TC: torch.Tensor,
    branch_scale_C: torch.Tensor | None,
    alpha: float | None = None,
    addend: Addend | None = None,
    *,
    branch_norm_C: torch.Tensor | None = None,
    eps: float = 0.0,
    counts_E: torch.Tensor | None = None,
) -> None:
    """x = alpha · x + scale · branch, in place; alpha None: 1. All others as in `add_norm`."""
    _launch(x_TC, branch_TC, None, x_TC, eps, branch_scale_C, branch_norm_C, alpha, addend, counts_E)


def _launch(
    x_TC: torch.Tensor,
    branch_TC: torch.Tensor | None,
    norm_C: torch.Tensor | None,
    out_TC: torch.Tensor,
    eps: float,
    branch_scale_C: torch.Tensor | None,
    branch_norm_C: torch.Tensor | None,
    alpha: float | None,
    addend: Addend | None,
    counts_E: torch.Tensor | None,
) -> None:
    width = x_TC.shape[1]
    num_experts = 0 if counts_E is None else len(counts_E)
    _add_norm_kernel[(len(x_TC),)](
        x_TC,
        x_TC if branch_TC is None else branch_TC,
        x_TC if branch_scale_C is None else branch_scale_C,
        x_TC if branch_norm_C is None else branch_norm_C,
        x_TC if norm_C is None else norm_C,
        out_TC,
        width,
        eps,
        1.0 if alpha is None else alpha,
        *((None, None) if addend is None else addend),
        counts_E,
        num_experts,
        TERMS=1 if branch_TC is None or not len(x_TC) else len(branch_TC) // len(x_TC),
        EXPERTS=triton.next_power_of_2(max(1, num_experts)),
        HAS_BRANCH=branch_TC is not None,
        HAS_SCALE=branch_scale_C is not None,
        HAS_BRANCH_NORM=branch_norm_C is not None,
        HAS_NORM=norm_C is not None,
        IN_PLACE=out_TC is x_TC,
        BLOCK=triton.next_power_of_2(width),
        num_warps=4 if width <= 4096 else 8,
        **overlapping(x_TC.device),
    )


@triton.jit
def _add_norm_kernel(
    x, branch, scale, branch_norm, norm, out, width, eps, alpha, delta, delta_scales, counts, num_experts,
    TERMS: tl.constexpr, EXPERTS: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_BRANCH_NORM: tl.constexpr, HAS_NORM: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    element = x.dtype.element_ty
    wait_for_inputs(OVERLAPS)
    total = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        addend = tl.load(branch + row * TERMS * width + column, mask=inside, other=0.0).to(tl.float32)
        for j in tl.static_range(1, TERMS):
            addend += tl.load(branch + (row * TERMS + j) * width + column, mask=inside, other=0.0).to(tl.float32)
        if TERMS > 1:
            addend = addend.to(element).to(tl.float32)  # round like a separate sum
        if delta is not None:
            if tl.load(delta_scales + row) != 0:
                addend += tl.load(delta + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BRANCH_NORM:
            branch_factor = tl.rsqrt(tl.sum(addend * addend, axis=0) / width + eps)
            branch_weight = tl.load(branch_norm + column, mask=inside, other=0.0).to(tl.float32)
            addend = (addend * branch_factor).to(element).to(tl.float32) * branch_weight
        if HAS_SCALE:
            addend *= tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
        total = alpha * total + addend
        # The norm reads the residual stream in the model's dtype.
        total = total.to(element).to(tl.float32)
        if not IN_PLACE:
            tl.store(x + row * width + column, total.to(element), mask=inside)
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(total * total, axis=0) / width + eps)
        weight = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
        total = (total * factor).to(element).to(tl.float32) * weight
    tl.store(out + row * width + column, total.to(element), mask=inside)
    if counts is not None:
        if row == 0:
            e = tl.arange(0, EXPERTS)
            tl.store(counts + e, tl.zeros([EXPERTS], tl.int32), mask=e < num_experts)
