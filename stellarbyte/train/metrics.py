"""Losses of held-out text that do not depend on the batch size, and how much of the device a run uses."""

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from stellarbyte.config import ByteModelConfig
from stellarbyte.model.loss import NO_LABEL, next_tokens
from stellarbyte.train.errors import TrainError
from stellarbyte.train.ranks import sum_over_ranks

# Dense bfloat16 products without sparsity, in FLOP/s, from the vendors' data sheets; by a part of the device's name
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """Attributes: loss: nats per token; num_tokens: that were predicted; bits_per_byte: None if not known."""

    loss: float
    num_tokens: int
    bits_per_byte: float | None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def as_metrics(self) -> dict[str, float]:
        """Under the names of transformers' Trainer."""
        metrics = {"eval_loss": self.loss, "eval_perplexity": self.perplexity, "eval_tokens": float(self.num_tokens)}
        return metrics if self.bits_per_byte is None else metrics | {"eval_bits_per_byte": self.bits_per_byte}


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    device: torch.device,
    *,
    bytes_per_token: float | None,
    autocast: AbstractContextManager[None] | None = None,
    counts: bool = True,
) -> HeldOutLoss:
    """Σ -log p / the number of predicted tokens, over all batches of all ranks; each rank gives its own batches.

    Args:
        counts: false on ranks that give the same batches as another.

    Raises:
        TrainError: no token is predicted.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with nullcontext() if autocast is None else autocast:
        for batch in batches:
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            targets = next_tokens(on_device["labels"], on_device.get("document_ids"))
            loss = model(**on_device, num_items_in_batch=1, skip_logits=True, use_cache=False).loss
            sums += torch.stack((loss.double(), (targets != NO_LABEL).sum().double()))
    model.train(was_training)
    total, count = sum_over_ranks(sums if counts else torch.zeros_like(sums)).tolist()
    if count == 0:
        raise TrainError("The held-out data has no token to predict; give more of it, or none.")
    loss_per_token = total / count
    in_bits = None if bytes_per_token is None else loss_per_token / math.log(2) / bytes_per_token
    return HeldOutLoss(loss=loss_per_token, num_tokens=int(count), bits_per_byte=in_bits)


def flops_per_token(config: ByteModelConfig, num_active_parameters: int, sequence: int) -> float:
    """Of a forward and a backward pass, without recomputation (Chowdhery et al. 2022, "PaLM", appendix B).

    6 for each parameter that multiplies (an embedding is only looked up), and 12 · heads · head_dim for each key that a
    token sees in each layer.
    """
    assert config.head_dim is not None  # ByteModelConfig sets it
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    of_keys = 0.0
    for window in config.windows:
        reach = sequence if window is None else min(window, sequence)
        seen = reach * (reach + 1) / 2 + (sequence - reach) * reach  # by all queries
        of_keys += 12 * config.num_attention_heads * config.head_dim * seen / sequence
    return 6 * (num_active_parameters - looked_up) + of_keys


def peak_flops(device: torch.device) -> float | None:
    """Of the device in bfloat16, FLOP/s; None: not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
