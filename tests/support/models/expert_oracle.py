"""What a mixture of experts must compute, in float64, token by token and expert by expert; none of our code."""

import math
from collections.abc import Mapping

import torch

from stellarbyte.config import ByteModelConfig

Weights = Mapping[str, torch.Tensor]  # float64, by their names in the layer


def gate(name: str, x: torch.Tensor) -> torch.Tensor:
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mixture(w: Weights, config: ByteModelConfig, x_TC: torch.Tensor) -> torch.Tensor:
    """The output of a layer's experts, dropless and without noise."""
    out_TC = torch.zeros_like(x_TC)
    for t, x in enumerate(x_TC):
        scores = scores_of(router_logits(w, x), config.router_score)
        bias = w.get("mlp.gate.e_score_correction_bias", torch.zeros(config.num_experts)).tolist()
        chosen = chosen_experts(scores, bias, config)
        total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
        for e in chosen:
            out_TC[t] += scores[e] / total * expert(w, config, e, x)
        out_TC[t] += shared_expert(w, config, x)
    return out_TC


def router_logits(w: Weights, x: torch.Tensor) -> list[float]:
    return (w["mlp.gate.weight"] @ x + w.get("mlp.gate.bias", torch.tensor(0.0))).tolist()


def scores_of(logits: list[float], kind: str) -> list[float]:
    if kind == "sigmoid":
        return [1 / (1 + math.exp(-z)) for z in logits]
    exponentials = [math.exp(z - max(logits)) for z in logits]
    return [value / sum(exponentials) for value in exponentials]


def ranking(scores: list[float], bias: list[float]) -> list[int]:
    """All experts, the best first; on ties the lower number."""
    return sorted(range(len(scores)), key=lambda e: (-(scores[e] + bias[e]), e))


def chosen_experts(scores: list[float], bias: list[float], config: ByteModelConfig) -> list[int]:
    """The experts that a token chooses, the best first."""
    best = ranking(scores, bias)[: config.num_experts_per_tok]
    if config.router_top_p is None:
        return best
    chosen: list[int] = []
    share = 0.0
    for e in best:
        if len(chosen) >= config.min_experts_per_tok and share >= config.router_top_p and config.router_top_p < 1:
            break
        chosen.append(e)
        share += scores[e] / sum(scores)
    return chosen


def expert(w: Weights, config: ByteModelConfig, e: int, x: torch.Tensor) -> torch.Tensor:
    gate_up = w["mlp.experts.gate_up_proj"][e] @ x
    if config.expert_bias:
        gate_up = gate_up + w["mlp.experts.gate_up_proj_bias"][e]
    size = len(gate_up) // 2
    out = w["mlp.experts.down_proj"][e] @ _product(config, gate_up[:size], gate_up[size:])
    return out + w["mlp.experts.down_proj_bias"][e] if config.expert_bias else out


def _product(config: ByteModelConfig, gates: torch.Tensor, ups: torch.Tensor) -> torch.Tensor:
    if config.swiglu_limit is None:
        return gate(config.hidden_act, gates) * ups
    assert config.swiglu_alpha is not None
    limit = torch.tensor(config.swiglu_limit, dtype=torch.float64)
    gates, ups = torch.minimum(gates, limit), torch.maximum(torch.minimum(ups, limit), -limit)
    return (ups + 1) * gates / (1 + torch.exp(-config.swiglu_alpha * gates))


def shared_expert(w: Weights, config: ByteModelConfig, x: torch.Tensor) -> torch.Tensor:
    """0 without one."""
    if "mlp.shared_expert.up_proj.weight" not in w:
        return torch.zeros_like(x)
    inner = gate(config.hidden_act, w["mlp.shared_expert.gate_proj.weight"] @ x)
    out = w["mlp.shared_expert.down_proj.weight"] @ (inner * (w["mlp.shared_expert.up_proj.weight"] @ x))
    if "mlp.shared_expert_gate.weight" in w:
        out = out / (1 + torch.exp(-w["mlp.shared_expert_gate.weight"] @ x))
    return out


def placed_experts(
    scores: list[list[float]], rankings: list[list[int]], num_chosen: list[int], capacity: int
) -> list[list[int]]:
    """The experts that each token gets where none takes more than `capacity` tokens.

    Round by round: every choice that is left asks one expert, at first the chosen one, then the token's next one with
    room. An expert takes those who ask in the order of their scores (on ties the earlier token) while it has room.
    """
    room = [capacity] * len(rankings[0])
    got: list[list[int]] = [[] for _ in rankings]
    asks = [(t, r) for t, count in enumerate(num_chosen) for r in range(count)]  # token, place in its ranking
    asked_up_to = list(num_chosen)
    while asks:
        left: list[int] = []  # tokens, once for each choice
        for t, r in sorted(asks, key=lambda ask: (-scores[ask[0]][rankings[ask[0]][ask[1]]], ask)):
            e = rankings[t][r]
            if room[e]:
                room[e] -= 1
                got[t].append(e)
            else:
                left.append(t)
        asks = []
        for t in sorted(left):
            free = [r for r in range(asked_up_to[t], len(room)) if room[rankings[t][r]]]
            if free:
                asks.append((t, free[0]))
                asked_up_to[t] = free[0] + 1
    return got
