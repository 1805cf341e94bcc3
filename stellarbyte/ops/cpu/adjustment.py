"""Logit adjustment, compiled. Mathematics and order of steps are those of `sampling/adjustment.py`."""

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit

from stellarbyte.ops.cpu import KEEP_COMPILED
from stellarbyte.sampling.adjustment import LogitAdjustment, RowAdjustment

# R rows, V vocabulary, W words of 32 tokens, B biases

_NO_WORDS = np.zeros(0, np.uint32)
_NO_IDS = np.zeros(0, np.int64)
_NO_NUMBERS = np.zeros(0, np.float32)


def adjust_logits(logits_RV: torch.Tensor, rows: Sequence[RowAdjustment | None]) -> None:
    """Change each row of float32 logits in place."""
    logits = logits_RV.numpy()
    for i, row in enumerate(rows):
        if row is not None:
            words_W = _NO_WORDS if row.allowed_W is None else row.allowed_W
            _adjust_row(logits[i], words_W, *_arrays(row.adjustment))


def _arrays(adjustment: LogitAdjustment) -> tuple[np.ndarray, ...]:
    """Biased tokens, biases, divisors and deductions; empty if absent."""
    return (
        _NO_IDS if adjustment.bias_ids is None else adjustment.bias_ids.numpy(),
        _NO_NUMBERS if adjustment.bias is None else adjustment.bias.numpy(),
        _NO_NUMBERS if adjustment.divisor_V is None else adjustment.divisor_V.numpy(),
        _NO_NUMBERS if adjustment.deduction_V is None else adjustment.deduction_V.numpy(),
    )


@njit(error_model="numpy", nogil=True, cache=KEEP_COMPILED)
def _adjust_row(logits_V, allowed_W, bias_ids_B, bias_B, divisor_V, deduction_V):
    if len(allowed_W):
        for v in range(len(logits_V)):
            is_allowed = (allowed_W[v >> 5] >> np.uint32(v & 31)) & np.uint32(1)
            logits_V[v] = logits_V[v] if is_allowed else np.float32(-np.inf)
    for i in range(len(bias_ids_B)):
        logits_V[bias_ids_B[i]] += bias_B[i]
    if len(divisor_V):
        for v in range(len(logits_V)):
            logits_V[v] = logits_V[v] / divisor_V[v] if logits_V[v] > 0 else logits_V[v] * divisor_V[v]
    if len(deduction_V):
        for v in range(len(logits_V)):
            logits_V[v] -= deduction_V[v]
