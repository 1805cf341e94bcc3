"""What is pruned before quantization: attention heads and inner channels are cut out, single weights become 0."""

from dataclasses import dataclass

import torch

from stellarbyte.compress.errors import CompressError
from stellarbyte.compress.heads import head_importance, heads_to_keep, prune_heads
from stellarbyte.compress.neurons import prune_neurons, prune_weights
from stellarbyte.model.transformer import ByteTransformer

_SEQUENCES = 16  # of the calibration text, of which the importance of heads is computed
_SEQUENCES_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """Shares to remove, each at least 0 and less than 1.

    Attributes:
        heads: by importance, groups that share keys and values together.
        neurons: inner channels of MLPs, by magnitude.
        weights: of each matrix, by magnitude: they become 0 and stay stored.
    """

    heads: float = 0.0
    neurons: float = 0.0
    weights: float = 0.0

    def __post_init__(self) -> None:
        for name in ("heads", "neurons", "weights"):
            if not 0 <= getattr(self, name) < 1:
                raise CompressError(f"prune {name} ({getattr(self, name)}) must be at least 0 and less than 1.")

    @property
    def is_sparse(self) -> bool:
        return self.weights > 0

    def __str__(self) -> str:
        shares = {"heads": self.heads, "neurons": self.neurons, "weights": self.weights}
        return ", ".join(f"{name}={share:g}" for name, share in shares.items() if share)


def pruned_model(model: ByteTransformer, pruning: Pruning, calibration_BT: torch.Tensor) -> ByteTransformer:
    """The model without what is pruned, in its dtype. `model` may share memory with a file, and may be changed.

    Raises:
        CompressError: the model cannot be pruned in this way.
    """
    dtype = model.dtype
    model = model.float()
    try:
        if pruning.heads:
            batches = [{"input_ids": ids_BT} for ids_BT in calibration_BT[:_SEQUENCES].split(_SEQUENCES_AT_ONCE)]
            kept_LH = heads_to_keep(head_importance(model, batches), model.config, pruning.heads)
            model = prune_heads(model, kept_LH)
        if pruning.neurons:
            model = prune_neurons(model, pruning.neurons)
        if pruning.weights:
            prune_weights(model, pruning.weights)
    except ValueError as error:
        raise CompressError(f"The model cannot be pruned: {error}.") from error
    return model.to(dtype).requires_grad_(False).eval()
