"""A mixture-of-experts layer on the GPU: route, multiply by the chosen experts, sum by their gates."""

from dataclasses import dataclass

import torch

from stellarbyte.model.mlp import ClampedSwiglu
from stellarbyte.ops.triton.moe import groups, pairs
from stellarbyte.ops.triton.moe.routing import MAX_NORMED_ROWS, Router, route
from stellarbyte.ops.triton.moe.scratch import ExpertScratch
from stellarbyte.ops.triton.weights import ExpertWeight

# T tokens, E experts, C hidden size, I intermediate size of an expert

MAX_PAIR_ROWS = 2  # of tokens whose pairs are computed one by one


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Gated MLPs of one size."""

    gate_up: ExpertWeight  # [E, 2I, C], an expert's gates above its ups
    down: ExpertWeight  # [E, C, I]
    swiglu: ClampedSwiglu | None = None  # in the place of the gate


def make_scratch(max_rows: int, router: Router, experts: Experts) -> ExpertScratch:
    """For layers like this one, and up to `max_rows` tokens at a time."""
    num_experts, hidden_size, intermediate_size = experts.down.matrix_ENK.shape
    return ExpertScratch.make(
        max_rows=max_rows,
        max_normed_rows=min(max_rows, MAX_NORMED_ROWS),
        num_experts=num_experts,
        top_k=router.top_k,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        dtype=router.weight_EC.dtype,
        device=router.weight_EC.device,
    )


def moe(
    x_TC: torch.Tensor,
    router: Router,
    experts: Experts,
    scratch: ExpertScratch,
    *,
    gate: int,
    norm_C: torch.Tensor | None = None,
    eps: float = 0.0,
    residual_TC: torch.Tensor | None = None,
    branch_scale_C: torch.Tensor | None = None,
    is_invariant: bool = False,
) -> torch.Tensor:
    """residual + branch_scale · Σ g_e · down_e (gate(gates_e x) · ups_e x) over each token's chosen experts e.

    Products have their biases. Gates g_e in float32, sums in float32, their terms in the model's
    dtype. No token is dropped. More rows than the scratch is for are computed in parts.

    Args:
        x_TC: contiguous, float32 or bfloat16, like all matrices that are not quantized.
        gate: of `gates.GATES`; unless the experts have a clamped SwiGLU.
        norm_C: weight of an RMSNorm of x before all else, with `eps`; for at most `MAX_NORMED_ROWS` rows.
        residual_TC: contiguous, of x's shape and dtype.
        is_invariant: the bits of a row do not depend on the other rows; without a norm.
    """
    out_TC = torch.empty_like(x_TC)
    for first in range(0, len(x_TC), scratch.max_rows):
        rows = slice(first, first + scratch.max_rows)
        part_TC, out_part_TC = x_TC[rows], out_TC[rows]
        residual_part_TC = None if residual_TC is None else residual_TC[rows]
        top_k, is_paired = router.top_k, len(part_TC) <= MAX_PAIR_ROWS and not is_invariant
        part_TC = route(
            part_TC, router, scratch, norm_C=norm_C, eps=eps, lists_pairs=not is_paired, is_invariant=is_invariant
        )
        if is_paired:
            pairs.gate_up(
                part_TC, experts.gate_up, scratch, top_k=top_k, gate=gate, swiglu=experts.swiglu,
                tile=pairs.gate_up_tile(part_TC.shape[1]),
            )  # fmt: skip
            pairs.down(
                out_part_TC, experts.down, scratch, top_k=top_k, residual_TC=residual_part_TC,
                branch_scale_C=branch_scale_C, tile=pairs.down_tile(experts.down.matrix_ENK.shape[2]),
            )  # fmt: skip
            continue
        _products(part_TC, router, experts, scratch, gate, is_invariant=is_invariant)
        groups.combine(out_part_TC, scratch, top_k=top_k, residual_TC=residual_part_TC, branch_scale_C=branch_scale_C)
    return out_TC


def has_terms(x_TC: torch.Tensor, scratch: ExpertScratch) -> bool:
    """Whether `terms` computes these rows: several, in one part."""
    return MAX_PAIR_ROWS < len(x_TC) <= scratch.max_rows


def terms(x_TC: torch.Tensor, router: Router, experts: Experts, scratch: ExpertScratch, *, gate: int) -> torch.Tensor:
    """[P, C]: the terms of each token's sum, adjacent, in the scratch. Their reader sets `counts` of the scratch to 0.

    For a reader that can sum them itself (`norm.add_norm`); otherwise as `moe`.
    """
    route(x_TC, router, scratch)
    _products(x_TC, router, experts, scratch, gate)
    num_pairs, width = len(x_TC) * router.top_k, x_TC.shape[1]
    return scratch.outputs[: num_pairs * width].view(num_pairs, width)


def _products(
    x_TC: torch.Tensor,
    router: Router,
    experts: Experts,
    scratch: ExpertScratch,
    gate: int,
    *,
    is_invariant: bool = False,
) -> None:
    """The terms of several tokens, after `route`."""
    num_tokens, top_k = len(x_TC), router.top_k
    sizes = (num_tokens, top_k, len(router.weight_EC), x_TC.dtype)
    gate_up_tile, down_tile = groups.gate_up_tile(*sizes), groups.down_tile(*sizes)
    if is_invariant:
        gate_up_tile = down_tile = groups.invariant_tile(x_TC.dtype)
    groups.gate_up(x_TC, experts.gate_up, scratch, top_k=top_k, gate=gate, swiglu=experts.swiglu, tile=gate_up_tile)
    groups.down(num_tokens, experts.down, scratch, top_k=top_k, tile=down_tile)
