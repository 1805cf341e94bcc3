"""Cross entropy of the next tokens, without the logits of the whole batch in memory."""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from stellarbyte.model.positions import document_starts

# B sequences, T tokens, N tokens of all sequences, C hidden size, V vocabulary

NO_LABEL = -100
CHUNK_ELEMENTS = 1 << 26  # logits in memory at once: 256 MiB in float32


def next_tokens(labels_BT: torch.Tensor, document_ids: torch.Tensor | None) -> torch.Tensor:
    """[B, T]: at each position the label after it; NO_LABEL at the end of a row, and of a document in it."""
    targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=NO_LABEL)
    if document_ids is None:
        return targets_BT
    ends_BT = F.pad(document_starts(document_ids)[:, 1:], (0, 1), value=True)
    return targets_BT.masked_fill(ends_BT, NO_LABEL)


def summed_loss(logits_NV: torch.Tensor, targets_N: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Σ over the targets of (1 - ε) · -log p(target) + ε · the mean of -log p over the vocabulary, in float32.

    Szegedy et al. 2015, "Rethinking the Inception Architecture", section 7. Targets that are NO_LABEL add nothing.
    """
    return F.cross_entropy(
        logits_NV.float(), targets_N, ignore_index=NO_LABEL, reduction="sum", label_smoothing=smoothing
    )


def summed_loss_of_hidden(
    hidden_NC: torch.Tensor,
    targets_N: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    smoothing: float,
) -> torch.Tensor:
    """As `summed_loss` of head(hidden), by chunks of at most CHUNK_ELEMENTS logits, which the backward pass
    recomputes. Only tokens with a target get logits: of a chat, those of the answers. (A compiled graph computes all:
    its shapes cannot depend on the targets.)"""
    if not torch.compiler.is_compiling():
        learned_N = targets_N != NO_LABEL
        hidden_NC, targets_N = hidden_NC[learned_N], targets_N[learned_N]

    def of_chunk(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return summed_loss(head(hidden), targets, smoothing)

    rows = max(1, CHUNK_ELEMENTS // vocab_size)
    if len(hidden_NC) <= rows:
        return of_chunk(hidden_NC, targets_N)
    losses = [
        checkpoint(of_chunk, hidden, targets, use_reentrant=False)
        for hidden, targets in zip(hidden_NC.split(rows), targets_N.split(rows), strict=True)
    ]
    return torch.stack(losses).sum()
