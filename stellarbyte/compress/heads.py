"""Removing attention heads by importance (Michel et al. 2019, "Are Sixteen Heads Really Better than One?").

Heads that share keys and values are removed together, as a group, and every layer loses the same number of groups: the
result is a ByteTransformer with another `num_attention_heads`, which every backend serves.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from stellarbyte.checkpoint.shapes import expected_shapes
from stellarbyte.compress.cutting import plain_weights, smaller_model
from stellarbyte.config import ByteModelConfig
from stellarbyte.model.parts import module_path
from stellarbyte.model.transformer import ByteTransformer

# B sequences, T tokens, L layers, H query heads, K key/value heads, G = H/K heads of a group, D head dim


def head_importance(model: ByteTransformer, batches: Iterable[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """How much the loss of a sequence changes with each head: the mean over sequences of |∂loss/∂ξ|.

    ξ = 1 is a factor on the head's output before the output projection; the loss is the mean over a sequence's labels.
    The model is read in evaluation mode, with its adapters; no parameter gets a gradient.

    Args:
        batches: arguments of forward: input_ids [B, T] and, if wanted, attention_mask, position_ids and labels (-100:
            ignored); without labels they are the input_ids that are not masked.

    Returns:
        [L, H] float32, on the CPU.

    Raises:
        ValueError: no sequence has a label to predict.
    """
    total_LH = torch.zeros(model.config.num_hidden_layers, model.config.num_attention_heads)
    num_sequences = 0
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            gradients_BLH = _mask_gradients(model, dict(batch))
            total_LH += gradients_BLH.abs().sum(dim=0).cpu()
            num_sequences += len(gradients_BLH)
    finally:
        model.train(was_training)
    if num_sequences == 0:
        raise ValueError("batches hold no sequence with a label to predict; heads have no importance without a loss")
    return total_LH / num_sequences


def _mask_gradients(model: ByteTransformer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, L, H] ∂loss/∂ξ of the sequences that have a label."""
    labels = inputs.pop("labels", None)
    if labels is None:
        labels = inputs["input_ids"]
        if "attention_mask" in inputs:
            labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    shape = len(labels), model.config.num_hidden_layers, model.config.num_attention_heads
    with torch.enable_grad():
        factors_BLH = torch.ones(shape, device=labels.device, requires_grad=True)
        with _scaled_heads(model, factors_BLH):
            logits = model(**inputs, use_cache=False).logits
        following = labels[:, 1:]
        losses_BT = F.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), following, ignore_index=-100, reduction="none"
        )
        num_labels_B = (following != -100).sum(dim=1)
        losses_B = losses_BT.sum(dim=1) / num_labels_B.clamp(min=1)
        # A sequence's factors change its own loss only, so one backward gives every sequence its own gradients.
        (gradients_BLH,) = torch.autograd.grad(losses_B.sum(), factors_BLH)
    return gradients_BLH[num_labels_B > 0]


@contextmanager
def _scaled_heads(model: ByteTransformer, factors_BLH: torch.Tensor) -> Iterator[None]:
    """Multiplies every head's output, the input of the output projection [B, T, H·D]."""

    def hook(layer: int) -> Any:
        def scale(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
            heads = inputs[0].unflatten(-1, (factors_BLH.shape[2], -1))
            return (heads * factors_BLH[:, None, layer, :, None].to(heads.dtype)).flatten(-2)

        return scale

    outputs = [
        model.get_submodule(module_path(layer, "self_attn.o_proj")) for layer in range(model.config.num_hidden_layers)
    ]
    handles = [output.register_forward_pre_hook(hook(layer)) for layer, output in enumerate(outputs)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def heads_to_keep(importance_LH: torch.Tensor, config: ByteModelConfig, ratio: float) -> torch.Tensor:
    """A mask for `prune_heads` that removes from every layer the groups of heads with the least importance.

    The importance of a group is the sum of its heads'. Of K groups, floor(ratio · K) are removed.

    Args:
        importance_LH: as `head_importance` gives it; layers are not compared with each other.
        ratio: share of heads to remove, at least 0 and less than 1.

    Returns:
        [L, H] bool, true: kept.

    Raises:
        ValueError: ratio is out of range, or the importance is not [L, H].
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio ({ratio}) must be at least 0 and less than 1")
    num_groups = _num_groups(config)
    expected = (config.num_hidden_layers, config.num_attention_heads)
    if importance_LH.shape != expected:
        raise ValueError(f"importance has shape {list(importance_LH.shape)}, expected {list(expected)}: layers, heads")
    of_groups_LK = importance_LH.unflatten(1, (num_groups, -1)).sum(dim=2)
    num_kept = num_groups - math.floor(ratio * num_groups + 1e-9)  # 0.29 · 100 is a little below 29
    kept_LK = torch.zeros_like(of_groups_LK, dtype=torch.bool)
    kept_LK.scatter_(1, of_groups_LK.topk(num_kept, dim=1).indices, True)
    return kept_LK.repeat_interleave(config.num_attention_heads // num_groups, dim=1)


def prune_heads(model: ByteTransformer, keep_LH: torch.Tensor) -> ByteTransformer:
    """A new model without the heads that `keep_LH` marks false: their rows of q, k and v and columns of o are gone.

    The heads that stay compute what they did; nothing is shared with `model`, which does not change.

    Args:
        keep_LH: [L, H] bool. Heads of a group (that share keys and values) are kept or removed together, and every
            layer keeps the same number of heads, at least one group.

    Raises:
        ValueError: the mask is not as above (the message names the layer), the model has adapters, or its norms of
            queries and keys read all heads together, so that none can go without changing the others.
    """
    config = model.config
    if config.qk_norm and not config.qk_norm_per_head:
        raise ValueError("heads cannot be removed with qk_norm_per_head=False: its norms read all heads together")
    groups = _kept_groups(config, keep_LH)
    pruned = copy.deepcopy(config)
    group_size = config.num_attention_heads // _num_groups(config)
    pruned.num_key_value_heads = len(groups[0])
    pruned.num_attention_heads = len(groups[0]) * group_size
    after, state = expected_shapes(pruned), {}
    for name, weight in plain_weights(model).items():
        for axis, (old, new) in enumerate(zip(weight.shape, after[name], strict=True)):
            if old != new:  # made of heads: as many rows for each group
                kept = groups[int(name.split(".")[2])].to(weight.device)
                weight = weight.unflatten(axis, (_num_groups(config), -1)).index_select(axis, kept)
                weight = weight.flatten(axis, axis + 1)
        state[name] = weight.clone()
    return smaller_model(model, pruned, state)


def _kept_groups(config: ByteModelConfig, keep_LH: torch.Tensor) -> list[torch.Tensor]:
    """For each layer the numbers of the groups that stay, in order."""
    expected = (config.num_hidden_layers, config.num_attention_heads)
    if keep_LH.shape != expected or keep_LH.dtype != torch.bool:
        found = f"{keep_LH.dtype} {list(keep_LH.shape)}"
        raise ValueError(f"the mask is {found}, expected torch.bool {list(expected)}: layers, heads")
    keep_LKG = keep_LH.unflatten(1, (_num_groups(config), -1))
    groups = []
    for layer, keep_KG in enumerate(keep_LKG):
        kept_K = keep_KG.any(dim=1)
        if not torch.equal(kept_K, keep_KG.all(dim=1)):
            raise ValueError(
                f"the mask splits a group in layer {layer}: {keep_KG.shape[1]} heads share keys and values, and are "
                "kept or removed together"
            )
        groups.append(kept_K.nonzero()[:, 0])
        if len(groups[-1]) != len(groups[0]) or len(groups[0]) == 0:
            raise ValueError(
                f"the mask keeps {int(keep_KG.sum())} heads in layer {layer} and {int(keep_LH[0].sum())} in layer 0; "
                "every layer must keep the same number, at least one group"
            )
    return groups


def _num_groups(config: ByteModelConfig) -> int:
    assert config.num_key_value_heads is not None  # ByteModelConfig sets it
    return config.num_key_value_heads
