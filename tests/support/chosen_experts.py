"""A mixture of experts in plain torch, token by token: what kernels of experts must compute."""

from collections.abc import Callable

import torch

# T tokens, E experts, J chosen experts of a token, C hidden size, I intermediate size of an expert


def choose_experts(
    logits_TE: torch.Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    renormalizes: bool = False,
    selection_bias_E: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts [T, J] of the highest scores, the best first, and their gates [T, J] in the logits' dtype.

    Scores are the softmax of the logits (Shazeer et al. 2017), or the sigmoid of each (DeepSeek-V3). Equal scores go to
    the lower expert. Softmax with `renormalizes` is the softmax of the chosen logits alone (Mixtral).

    Args:
        renormalizes: divide the gates of a token by their sum.
        selection_bias_E: added to the scores for the choice only.
    """
    scores_TE = logits_TE.softmax(dim=-1) if score == "softmax" else logits_TE.sigmoid()
    preferences_TE = scores_TE if selection_bias_E is None else scores_TE + selection_bias_E
    order_TE = preferences_TE.sort(dim=-1, descending=True, stable=True).indices
    chosen_TJ = order_TE[:, :top_k]
    gates_TJ = scores_TE.gather(1, chosen_TJ)
    return chosen_TJ, gates_TJ / gates_TJ.sum(dim=-1, keepdim=True) if renormalizes else gates_TJ


def sum_of_experts(
    x_TC: torch.Tensor,
    chosen_TJ: torch.Tensor,
    gates_TJ: torch.Tensor,
    gate_up_ENK: torch.Tensor,
    down_ENK: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
    *,
    biases: tuple[torch.Tensor, torch.Tensor] | None = None,
    swiglu: tuple[float, float] | None = None,
) -> torch.Tensor:
    """Σ g_e · down_e (activation(gates_e x) · ups_e x) over each token's chosen experts e. Returns [T, C].

    Args:
        gate_up_ENK: [E, 2I, C], an expert's gates above its ups.
        down_ENK: [E, C, I].
        biases: of both, [E, 2I] and [E, C].
        swiglu: alpha and limit of gpt-oss's product of gates and ups; None: that of the activation.
    """
    out_TC = torch.zeros_like(x_TC)
    for t, (chosen_J, gates_J) in enumerate(zip(chosen_TJ.tolist(), gates_TJ, strict=True)):
        for expert, gate in zip(chosen_J, gates_J, strict=True):
            gate_up = gate_up_ENK[expert] @ x_TC[t]
            if biases is not None:
                gate_up = gate_up + biases[0][expert]
            gates_I, ups_I = gate_up.chunk(2)
            if swiglu is None:
                inner_I = activation(gates_I) * ups_I
            else:
                alpha, limit = swiglu
                gates_I, ups_I = gates_I.clamp(max=limit), ups_I.clamp(-limit, limit)
                inner_I = (ups_I + 1) * gates_I / (1 + torch.exp(-alpha * gates_I))
            out_TC[t] += gate * (down_ENK[expert] @ inner_I + (0 if biases is None else biases[1][expert]))
    return out_TC
