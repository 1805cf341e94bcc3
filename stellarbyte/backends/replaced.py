"""Embeddings and output heads of adapters (modules_to_save), in steps of the backends on a CPU.

A bank holds what they differ from the base's, so a request's scale multiplies that, as the rest of an adapter.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from stellarbyte.forward_batch import ForwardBatch
from stellarbyte.lora.bank import EMBEDDING, HEAD, LoraBank

# T tokens of the step, C hidden size, R rows of some of them, V vocabulary

RowAdapters = Sequence[tuple[int, float]]  # R: slot and scale of each row; slot 0: no adapter


def add_embeddings(x_TC: torch.Tensor, batch: ForwardBatch, bank: LoraBank) -> torch.Tensor:
    """x + scale · (the adapter's embedding less the base's), for the tokens whose adapter has one; x may change."""
    for rows, slot, scale in batch.adapted() if bank.replaced else ():
        if (change_VC := bank.replaced.get(slot, {}).get(EMBEDDING)) is not None:
            x_TC[rows] += scale * F.embedding(batch.token_ids_T[rows], change_VC)
    return x_TC


def add_logits(logits_RV: torch.Tensor, hidden_RC: torch.Tensor, adapters: RowAdapters, bank: LoraBank) -> torch.Tensor:
    """The same for rows of logits whose adapter has an output head."""
    for row, (slot, scale) in enumerate(adapters if bank.replaced else ()):
        if (change_VC := bank.replaced.get(slot, {}).get(HEAD)) is not None:
            logits_RV[row] += scale * (change_VC @ hidden_RC[row])
    return logits_RV
