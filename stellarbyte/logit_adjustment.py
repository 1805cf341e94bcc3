"""What requests ask to be done to logits before a token is sampled. Knows no requests and no randomness.

The order is that of the numerics: what is allowed at all (a grammar), what is banned for now, bias, then penalties.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# R rows, V vocabulary


@dataclass(frozen=True, kw_only=True)
class LogitAdjustment:
    """How one row's logits are changed.

    Attributes:
        allowed: uint32 words, bit v % 32 of word v // 32 says whether token v may follow; None: any may.
        banned: tokens that may not follow, unless nothing else may.
        bias: token id and what is added to its logit.
        repetition_penalty: divides positive logits, and multiplies negative ones, of all `tokens`.
        presence_penalty: taken from the logits of the tokens after the first `num_prompt`.
        frequency_penalty: the same, for every time a token occurs there.
        tokens: the sequence so far, prompt first, integers; only penalties need it.
    """

    allowed: np.ndarray | None = None
    banned: tuple[int, ...] = ()
    bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    tokens: np.ndarray | None = None
    num_prompt: int = 0


def adjust_logits(logits_RV: torch.Tensor, rows: Sequence[LogitAdjustment | None]) -> torch.Tensor:
    """Logits with each row's adjustment; a copy if there is any, float32 then. Rows without one stay as they are."""
    if not any(rows):
        return logits_RV
    logits_RV = logits_RV.to(torch.float32, copy=True)
    for logits_V, adjustment in zip(logits_RV, rows, strict=True):
        if adjustment is not None:
            _adjust(logits_V, adjustment)
    return logits_RV


def _adjust(logits_V: torch.Tensor, row: LogitAdjustment) -> None:
    device = logits_V.device
    if row.allowed is not None:
        bits = np.unpackbits(row.allowed.view(np.uint8), count=len(logits_V), bitorder="little")
        logits_V.masked_fill_(torch.from_numpy(bits == 0).to(device), float("-inf"))
    if row.banned:
        without = logits_V.clone()
        without[torch.tensor(row.banned, device=device)] = float("-inf")
        if without.isfinite().any():
            logits_V.copy_(without)
    if row.bias:
        ids, bias = zip(*row.bias, strict=True)
        logits_V[torch.tensor(ids, device=device)] += torch.tensor(bias, device=device)
    if row.tokens is None:
        return
    # Every time a token occurs it is read before and written with the same value, so repeats do no harm.
    tokens = torch.from_numpy(row.tokens.astype(np.int64)).to(device)
    if row.repetition_penalty != 1:
        found = logits_V[tokens]
        logits_V[tokens] = torch.where(found > 0, found / row.repetition_penalty, found * row.repetition_penalty)
    answer = tokens[row.num_prompt :]
    if row.presence_penalty:
        logits_V[answer] = logits_V[answer] - row.presence_penalty
    if row.frequency_penalty:
        logits_V.index_add_(0, answer, torch.full_like(answer, -row.frequency_penalty, dtype=logits_V.dtype))
