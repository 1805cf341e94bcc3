"""The router of a mixture-of-experts layer: which experts a token chooses, and with which gates."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from stellarbyte.config import ByteModelConfig
from stellarbyte.model.building import add_parts

# T tokens, C hidden size, E experts, K most choices of a token

MOST_MAXIMA = 8  # choices that are found one after the other; a sort of short rows costs a GPU as much as many of them
SMALLEST = torch.finfo(torch.float32).tiny  # a divisor in the place of 0


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The choices of some tokens. Gates and scores are float32.

    Attributes:
        experts_TK: the chosen experts, the best first; E: the place is empty.
        gates_TK: the factors of their outputs; 0 in empty places.
        num_pairs: number of places that are not empty.
        preference_TE: what orders the experts: scores, with the selection bias where there is one. No gradient.
        scores_TE: softmax or sigmoid of the logits, from which the gates come.
        logits_TE: without noise.
        noisy_logits_TE / noise_scale_TE: of noisy top-k in training, otherwise None.
    """

    experts_TK: torch.Tensor
    gates_TK: torch.Tensor
    num_pairs: int
    preference_TE: torch.Tensor
    scores_TE: torch.Tensor
    logits_TE: torch.Tensor
    noisy_logits_TE: torch.Tensor | None
    noise_scale_TE: torch.Tensor | None


class ByteRouter(nn.Module):
    """Chooses experts by the scores of a linear layer, in float32 whatever the model's dtype.

    top-k: the k experts of the highest score, on ties those of the lower number. A softmax over the chosen logits
    (Mixtral) is a softmax over all logits whose chosen part is renormalised, so both are one path. Dynamic k (Huang et
    al. 2024): the fewest experts whose share of the scores reaches p.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    e_score_correction_bias: nn.Parameter | None
    noise_weight: nn.Parameter | None

    def __init__(self, config: ByteModelConfig, layer: int) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.most, self.fewest = config.num_experts_per_tok, config.min_experts_per_tok
        self.is_sigmoid = config.router_score == "sigmoid"
        self.renormalises = config.norm_topk_prob
        self.top_p = config.router_top_p
        self.top_p_start, self.top_p_steps = config.router_top_p_start, config.router_top_p_steps
        self.step = 0  # of training
        self.noise, self.noise_scale = config.router_noise, config.router_noise_scale
        add_parts(self, "mlp.gate", config, layer)
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias.requires_grad_(False)  # `balance_experts` moves it

    def forward(self, x_TC: torch.Tensor) -> Routing:
        with torch.autocast(x_TC.device.type, enabled=False):
            return self._route(x_TC.float())

    def _route(self, x_TC: torch.Tensor) -> Routing:
        logits_TE = F.linear(x_TC, self.weight.float(), None if self.bias is None else self.bias.float())
        noisy_TE, scale_TE = self._with_noise(x_TC, logits_TE) if self.training else (logits_TE, None)
        scores_TE = noisy_TE.sigmoid() if self.is_sigmoid else noisy_TE.softmax(dim=-1)
        preference_TE = scores_TE.detach()
        if self.e_score_correction_bias is not None:
            preference_TE = preference_TE + self.e_score_correction_bias.float()
        experts_TK = best_experts(preference_TE, self.most)
        gates_TK = scores_TE.gather(1, experts_TK)
        num_pairs = experts_TK.numel()
        if self.top_p is not None:
            is_chosen_TK = self._is_within_share(gates_TK.detach(), scores_TE.detach())
            experts_TK = experts_TK.masked_fill(~is_chosen_TK, self.num_experts)
            gates_TK = gates_TK.masked_fill(~is_chosen_TK, 0)
            num_pairs = int(is_chosen_TK.sum())
        if self.renormalises:
            gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True).clamp(min=SMALLEST)
        return Routing(
            experts_TK=experts_TK,
            gates_TK=gates_TK,
            num_pairs=num_pairs,
            preference_TE=preference_TE,
            scores_TE=scores_TE,
            logits_TE=logits_TE,
            noisy_logits_TE=None if scale_TE is None else noisy_TE,
            noise_scale_TE=scale_TE,
        )

    def _with_noise(self, x_TC: torch.Tensor, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The logits that choose in training, and the standard deviation of noisy top-k's noise."""
        if self.noise == "none" or self.noise_scale == 0:
            return logits_TE, None
        if self.noise == "gumbel":
            return logits_TE - self.noise_scale * torch.empty_like(logits_TE).exponential_().log(), None
        assert self.noise_weight is not None
        scale_TE = self.noise_scale * F.softplus(F.linear(x_TC, self.noise_weight.float()))
        return logits_TE + scale_TE * torch.randn_like(logits_TE), scale_TE

    def _is_within_share(self, chosen_scores_TK: torch.Tensor, scores_TE: torch.Tensor) -> torch.Tensor:
        """Whether the better choices leave a place to fill: their share of the scores is below p."""
        share = self._share()
        shares_TK = chosen_scores_TK / scores_TE.sum(dim=-1, keepdim=True).clamp(min=SMALLEST)
        before_TK = shares_TK.cumsum(dim=-1) - shares_TK
        is_first_K = torch.arange(self.most, device=scores_TE.device) < self.fewest
        return is_first_K | (before_TK < share) if share < 1 else torch.ones_like(shares_TK, dtype=torch.bool)

    def _share(self) -> float:
        """p: of this training step, or the configured one outside training."""
        assert self.top_p is not None
        if not self.training or self.top_p_start is None or self.step >= self.top_p_steps:
            return self.top_p
        return self.top_p_start + (self.top_p - self.top_p_start) * self.step / self.top_p_steps


def best_experts(preference_TE: torch.Tensor, k: int) -> torch.Tensor:
    """[T, k]: the experts of the k highest preferences, the best first; on ties those of the lower number."""
    if k > MOST_MAXIMA:
        return preference_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    numbers_E = torch.arange(preference_TE.shape[-1], device=preference_TE.device)
    preference_TE = preference_TE.clamp(min=torch.finfo(preference_TE.dtype).min)  # above those that are chosen
    chosen = [preference_TE.argmax(dim=-1, keepdim=True)]  # the first of equal ones
    for _ in range(k - 1):
        preference_TE = preference_TE.masked_fill(numbers_E == chosen[-1], -torch.inf)
        chosen.append(preference_TE.argmax(dim=-1, keepdim=True))
    return torch.cat(chosen, dim=-1)


@torch.no_grad()
def move_selection_bias(bias_E: torch.Tensor, load_E: torch.Tensor, rate: float) -> None:
    """Raise the bias of experts with less than the mean load by `rate`, and lower that of the others, in place
    (Wang et al. 2024, "Auxiliary-loss-free load balancing")."""
    bias_E += rate * torch.sign(load_E.mean() - load_E).to(bias_E)
