"""Sends tokens to the experts that they chose, and returns the experts' outputs to them."""

import dataclasses
import math

import torch

from stellarbyte.model.moe.experts import ByteExperts
from stellarbyte.model.moe.pairs import copied_to_pairs, weighted_sums
from stellarbyte.model.moe.products import product_dtype
from stellarbyte.model.moe.router import SMALLEST, Routing

# T tokens, C hidden size, E experts, K most choices of a token, N pairs of a token and an expert


def dispatch(x_TC: torch.Tensor, routing: Routing, experts: ByteExperts) -> torch.Tensor:
    """Σ gate · expert(x) of each token, [T, C] in the dtype of the experts' products, summed in float32.

    The pairs are sorted by expert, so that an expert computes its tokens in one product.
    """
    num_places = routing.experts_TK.shape[1]
    chosen = routing.experts_TK.flatten()
    keys = chosen.to(torch.uint8) if experts.num_experts < 256 else chosen  # a radix sort passes once over each byte
    order = keys.argsort(stable=True)  # empty places come last
    row_TK = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    pair_N, row_TK = order[: routing.num_pairs], row_TK.view_as(routing.experts_TK)
    counts_E = (chosen[:, None] == torch.arange(experts.num_experts, device=chosen.device)).sum(dim=0)
    rows_NC = copied_to_pairs(x_TC.to(product_dtype(x_TC)), pair_N // num_places, row_TK)
    return weighted_sums(experts(rows_NC, counts_E), routing.gates_TK, pair_N, row_TK)


def within_capacity(routing: Routing, factor: float, is_token_T: torch.Tensor | None = None) -> Routing:
    """The routing in which no expert has more than `capacity` tokens.

    In each round, experts take the tokens that choose them, those of the highest score first (on ties the earlier
    token), while they have room. Every choice left over then goes to the token's next expert in its order of
    preference that still has room, until no expert has. The gates of a token are the scores of the experts that it
    got, scaled to the sum that its gates had. A token without any expert keeps its shared expert, or only the residual.

    Args:
        factor: capacity = ceil(factor · pairs / E).
        is_token_T: False: padding, which takes no room and gets no expert.
    """
    num_experts = routing.scores_TE.shape[1]
    ranking_TE = routing.preference_TE.sort(dim=1, descending=True, stable=True).indices  # begins with the chosen ones
    wanted_TK = routing.experts_TK.clone()
    if is_token_T is not None:
        wanted_TK[~is_token_T] = num_experts
    num_pairs = int((wanted_TK < num_experts).sum())
    room_E = torch.full((num_experts,), capacity(factor, num_pairs, num_experts), device=wanted_TK.device)
    placed_TK = torch.full_like(wanted_TK, num_experts)
    next_T = (wanted_TK < num_experts).sum(dim=1)  # place in the ranking after the last expert that was asked
    scores_TE = routing.scores_TE.detach()
    while bool((wanted_TK < num_experts).any()):
        takes_TK = _first_in_line(wanted_TK, scores_TE, room_E)
        placed_TK = torch.where(takes_TK, wanted_TK, placed_TK)
        room_E = room_E - torch.bincount(wanted_TK[takes_TK], minlength=num_experts)
        is_left_TK = (wanted_TK < num_experts) & ~takes_TK
        wanted_TK, next_T = _next_choices(is_left_TK, ranking_TE, next_T, room_E)
    is_placed_TK = placed_TK < num_experts
    gates_TK = routing.scores_TE.gather(1, placed_TK.clamp(max=num_experts - 1)).masked_fill(~is_placed_TK, 0)
    had_T1, has_T1 = (gates.sum(dim=1, keepdim=True) for gates in (routing.gates_TK, gates_TK))
    gates_TK = gates_TK * (had_T1 / has_T1.clamp(min=SMALLEST))
    return dataclasses.replace(routing, experts_TK=placed_TK, gates_TK=gates_TK, num_pairs=int(is_placed_TK.sum()))


def capacity(factor: float, num_pairs: int, num_experts: int) -> int:
    """The most tokens that an expert takes."""
    return math.ceil(factor * num_pairs / num_experts)


def _first_in_line(wanted_TK: torch.Tensor, scores_TE: torch.Tensor, room_E: torch.Tensor) -> torch.Tensor:
    """[T, K] true where the wanted expert takes the token: its place in the expert's line is below the room."""
    num_experts = len(room_E)
    wanted = wanted_TK.flatten()
    scores = scores_TE.gather(1, wanted_TK.clamp(max=num_experts - 1)).flatten()
    by_score = scores.argsort(descending=True, stable=True)
    order = by_score[wanted[by_score].argsort(stable=True)]  # by expert, and for each expert by score
    counts = torch.bincount(wanted, minlength=num_experts + 1)
    starts = counts.cumsum(0) - counts
    places = torch.empty_like(wanted)
    places[order] = torch.arange(len(wanted), device=wanted.device) - starts[wanted[order]]
    room = torch.cat((room_E, room_E.new_zeros(1)))  # none for those that want nothing
    return (places < room[wanted]).view_as(wanted_TK)


def _next_choices(
    is_left_TK: torch.Tensor, ranking_TE: torch.Tensor, next_T: torch.Tensor, room_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For the j-th choice left over of each token, the j-th expert with room from place `next_T` of its ranking on; E
    where there is none. Also the place after the last one that was passed."""
    num_experts = len(room_E)
    ranks_E = torch.arange(num_experts, device=next_T.device)
    is_free_TE = (room_E > 0)[ranking_TE] & (ranks_E >= next_T[:, None])
    number_TE = is_free_TE.cumsum(dim=1).masked_fill(~is_free_TE, 0)  # 1, 2 ... of the free ones
    number_TK = is_left_TK.cumsum(dim=1).masked_fill(~is_left_TK, -1)
    is_match_TKE = number_TK[:, :, None] == number_TE[:, None, :]
    is_found_TK = is_match_TKE.any(dim=2)
    ranks_TK = is_match_TKE.int().argmax(dim=2)
    wanted_TK = ranking_TE.gather(1, ranks_TK).masked_fill(~is_found_TK, num_experts)
    passed_TK = (ranks_TK + 1).masked_fill(~is_found_TK, 0)
    return wanted_TK, torch.maximum(next_T, passed_TK.amax(dim=1))
