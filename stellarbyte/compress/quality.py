"""Perplexity and divergence of a compressed model on held-out contexts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from stellarbyte.config import ByteModelConfig
from stellarbyte.model.logits import finish_logits

# B contexts, T tokens, C hidden size, V vocabulary


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Attributes: perplexity_before, perplexity_after: exp of the mean of -log p over all tokens but the first of each
    context; kl: the mean of KL(before ‖ after) over the same places, in nats; tokens: their number."""

    perplexity_before: float
    perplexity_after: float
    kl: float
    tokens: int

    @property
    def change(self) -> float:
        return self.perplexity_after / self.perplexity_before - 1


@torch.no_grad()
def compare(
    config: ByteModelConfig,
    contexts_BT: torch.Tensor,
    before: tuple[Sequence[torch.Tensor], torch.Tensor],
    after: tuple[Sequence[torch.Tensor], torch.Tensor],
) -> Quality:
    """Compare two models with one vocabulary.

    Args:
        before, after: hidden states of all contexts after the final norm, [B, T, C] in batches, and the head [V, C].
    """
    heads = before[1].float(), after[1].float()
    states = [[row_TC for batch in batches for row_TC in batch] for batches, _ in (before, after)]
    losses, divergence, count = [0.0, 0.0], 0.0, 0
    for ids_T, *rows in zip(contexts_BT, *states, strict=True):
        log_probs = []
        for i, (row_TC, head_VC) in enumerate(zip(rows, heads, strict=True)):
            logits = finish_logits(F.linear(row_TC[:-1], head_VC), config.logits_multiplier, config.logits_softcap)
            log_probs.append(logits.log_softmax(dim=-1))
            losses[i] += F.nll_loss(log_probs[i], ids_T[1:], reduction="sum").item()
        divergence += F.kl_div(log_probs[1], log_probs[0], reduction="sum", log_target=True).item()
        count += len(ids_T) - 1
    return Quality(
        perplexity_before=math.exp(losses[0] / count),
        perplexity_after=math.exp(losses[1] / count),
        kl=divergence / count,
        tokens=count,
    )
