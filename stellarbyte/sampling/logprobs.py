"""Log-probabilities of tokens in the model's own distribution, before temperature and adjustments."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

# R rows, V vocabulary

_ALIGNMENT = 4  # float32 numbers of 16 bytes


class TokenLogprobs(NamedTuple):
    """A token's natural log-probability, and those of the likeliest tokens, the likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # token id, log-probability


def token_ranks(logits_RV: torch.Tensor, token_ids: Sequence[int]) -> list[int]:
    """For each row of raw logits the place of its token among all: 1 is the likeliest, and equal ones share a place."""
    chosen_R1 = logits_RV.gather(-1, torch.tensor(token_ids, device=logits_RV.device)[:, None])
    return ((logits_RV > chosen_R1).sum(dim=-1) + 1).tolist()


def token_logprobs(logits_RV: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """For each row of raw logits the log-probability of its token, and of its `num_top` likeliest tokens."""
    logprobs_RV = _log_softmax(logits_RV.float())
    chosen = logprobs_RV.gather(-1, torch.tensor(token_ids, device=logits_RV.device)[:, None])[:, 0].tolist()
    most = min(max(num_top), logits_RV.shape[-1])
    if not most:
        return [TokenLogprobs(logprob, ()) for logprob in chosen]
    values, ids = logprobs_RV.topk(most, dim=-1)
    top = [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprobs(logprob, row[:count]) for logprob, row, count in zip(chosen, top, num_top, strict=True)]


def _log_softmax(logits_RV: torch.Tensor) -> torch.Tensor:
    """With the same bits in any row: CUDA's kernel orders a row's sum by where the row begins in its 16 bytes."""
    vocab_size = logits_RV.shape[-1]
    if vocab_size % _ALIGNMENT:
        logits_RV = F.pad(logits_RV, (0, -vocab_size % _ALIGNMENT), value=float("-inf"))
    return logits_RV.log_softmax(dim=-1)[:, :vocab_size]
