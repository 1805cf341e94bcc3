"""What training reports of its routers: auxiliary losses, and the load of each expert."""

import math
from typing import NamedTuple

import torch

from stellarbyte.config import ByteModelConfig
from stellarbyte.model.moe.router import SMALLEST, Routing

# T tokens, E experts, K most choices of a token, L layers with experts


class RouterSums(NamedTuple):
    """Sums over the tokens of one layer, padding left out; float32."""

    num_tokens: torch.Tensor
    choices_E: torch.Tensor  # tokens that chose an expert, before any capacity
    gates_E: torch.Tensor
    probabilities_E: torch.Tensor  # scores divided by their sum
    load_E: torch.Tensor  # chance that an expert is chosen
    squared_z: torch.Tensor  # logsumexp(logits)²


class RouterLog:
    """The sums of every layer with experts of one forward.

    Args:
        is_token: [...] as the hidden states; False: padding. None: there is none.
    """

    def __init__(self, is_token: torch.Tensor | None = None) -> None:
        self.is_token_T = None if is_token is None else is_token.flatten()
        self.layers: list[RouterSums] = []


class RouterLosses(NamedTuple):
    """Means over the layers with experts, in the order of the numerics; `expert_load` is of each layer.

    Attributes:
        balance_loss: E Σ f_e P_e (Fedus et al. 2021, "Switch Transformers"): f_e choices of the expert per token, P_e
            its mean probability. It is num_experts_per_tok where the load is even.
        z_loss: mean of logsumexp(logits)² (Zoph et al. 2022, "ST-MoE").
        router_entropy: entropy in nats of the experts' shares of all gates. Training maximises it.
        load_kl: Kullback-Leibler divergence of the expected load from an even one. The expected load is that of noisy
            top-k (Shazeer et al. 2017, appendix A) where it has noise, otherwise the mean probability.
        expert_load: [L, E] share of the tokens that chose each expert.
    """

    balance_loss: torch.Tensor
    z_loss: torch.Tensor
    router_entropy: torch.Tensor
    load_kl: torch.Tensor
    expert_load: torch.Tensor

    def weighted(self, config: ByteModelConfig) -> torch.Tensor:
        """The sum of all losses with their coefficients."""
        return (
            config.router_balance_coef * self.balance_loss
            + config.router_z_coef * self.z_loss
            - config.router_entropy_coef * self.router_entropy
            + config.router_load_coef * self.load_kl
        )


def router_sums(routing: Routing, is_token_T: torch.Tensor | None) -> RouterSums:
    """The sums of one layer over its tokens."""
    num_experts = routing.scores_TE.shape[1]
    probabilities_TE = routing.scores_TE / routing.scores_TE.sum(dim=1, keepdim=True).clamp(min=SMALLEST)
    width = (len(probabilities_TE), num_experts + 1)
    empty_last = torch.zeros(width, dtype=torch.float32, device=probabilities_TE.device)
    chosen_TE = empty_last.scatter(1, routing.experts_TK, 1.0)[:, :-1]
    gates_TE = empty_last.scatter(1, routing.experts_TK, routing.gates_TK)[:, :-1]
    squared_z_T = routing.logits_TE.logsumexp(dim=1).square()
    load_TE = _noisy_load(routing)
    counts_T1 = (torch.ones_like(squared_z_T) if is_token_T is None else is_token_T.float())[:, None]
    return RouterSums(  # not as products, which autocast would compute in bfloat16
        num_tokens=counts_T1.sum(),
        choices_E=(counts_T1 * chosen_TE).sum(dim=0),
        gates_E=(counts_T1 * gates_TE).sum(dim=0),
        probabilities_E=(counts_T1 * probabilities_TE).sum(dim=0),
        load_E=(counts_T1 * (probabilities_TE if load_TE is None else load_TE)).sum(dim=0),
        squared_z=(counts_T1[:, 0] * squared_z_T).sum(),
    )


def _noisy_load(routing: Routing) -> torch.Tensor | None:
    """Chance of each expert to be among the k best if only its own noise were drawn again; None without noise.

    An expert has to exceed the k-th best of the others: the (k + 1)-th best of all for one that was chosen.
    """
    noisy_TE, scale_TE = routing.noisy_logits_TE, routing.noise_scale_TE
    if noisy_TE is None or scale_TE is None:
        return None
    k = routing.experts_TK.shape[1]
    if k == noisy_TE.shape[1]:
        return torch.ones_like(noisy_TE)
    best = noisy_TE.topk(k + 1, dim=1).values
    last_in_T1, first_out_T1 = best[:, k - 1 : k], best[:, k:]
    limit_TE = torch.where(noisy_TE > first_out_T1, first_out_T1, last_in_T1)
    return torch.special.ndtr((routing.logits_TE - limit_TE) / scale_TE.clamp(min=SMALLEST))


def router_losses(layers: list[RouterSums]) -> RouterLosses:
    """The losses of one forward from the sums of its layers."""
    num_tokens, choices_LE, gates_LE, probabilities_LE, load_LE, squared_z_L = map(
        torch.stack, zip(*layers, strict=True)
    )
    num_tokens_L1 = num_tokens[:, None].clamp(min=1)
    num_experts = choices_LE.shape[1]
    expert_load_LE = choices_LE / num_tokens_L1
    balance_L = num_experts * (expert_load_LE * probabilities_LE / num_tokens_L1).sum(dim=1)
    return RouterLosses(
        balance_loss=balance_L.mean(),
        z_loss=(squared_z_L / num_tokens_L1[:, 0]).mean(),
        router_entropy=_entropy(gates_LE).mean(),
        load_kl=(math.log(num_experts) - _entropy(load_LE)).mean(),
        expert_load=expert_load_LE.detach(),
    )


def _entropy(sums_LE: torch.Tensor) -> torch.Tensor:
    """Entropy of each row's shares of its sum, in nats."""
    shares_LE = sums_LE / sums_LE.sum(dim=1, keepdim=True).clamp(min=SMALLEST)
    return -torch.xlogy(shares_LE, shares_LE.clamp(min=SMALLEST)).sum(dim=1)
