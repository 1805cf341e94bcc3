"""Removing inner channels of MLPs, and weights, by magnitude (torch.nn.utils.prune)."""

import copy

import torch
from torch import nn
from torch.nn.utils import prune

from stellarbyte.checkpoint.shapes import matrix_names
from stellarbyte.compress.cutting import plain_weights, smaller_model
from stellarbyte.compress.quantization.grid import GROUPS
from stellarbyte.model.parts import module_path
from stellarbyte.model.transformer import ByteTransformer

# C hidden size, I inner channels

_WHOLE = max(GROUPS.values())  # inner channels that stay are whole groups of quantized matrices, where they were before


def prune_neurons(model: ByteTransformer, ratio: float) -> ByteTransformer:
    """A new model without the inner channels of least magnitude, rows of gate and up and columns of down.

    The magnitude of a channel is the Euclidean norm of all its weights. Of I channels, I - ratio · I stay in every
    layer, rounded up to whole groups of quantized matrices. Experts stay as they are.

    Raises:
        ValueError: ratio is not at least 0 and less than 1, or every layer has experts.
    """
    _check(ratio)
    config = copy.deepcopy(model.config)
    layers = [layer for layer, owner in enumerate(config.expert_layers) if owner is None]
    if not layers:
        raise ValueError("neurons cannot be removed: every layer of this model has experts instead of an MLP")
    inner = config.intermediate_size
    unit = _WHOLE if inner % _WHOLE == 0 else 1
    num_kept = -(-round(inner * (1 - ratio)) // unit) * unit
    config.intermediate_size = num_kept
    state = {name: weight.clone() for name, weight in plain_weights(model).items()}
    for layer in layers:
        names = {part: module_path(layer, f"mlp.{part}_proj.weight") for part in ("gate", "up", "down")}
        joined = nn.Linear(3 * config.hidden_size, inner, bias=False, dtype=torch.float32)
        columns = [state[names["gate"]], state[names["up"]], state[names["down"]].T]
        joined.weight.data = torch.cat([weight.float() for weight in columns], dim=1)
        prune.ln_structured(joined, "weight", amount=inner - num_kept, n=2, dim=0)
        kept_I = joined.get_buffer("weight_mask")[:, 0].nonzero()[:, 0]
        for name in (names["gate"], names["up"], *(n.replace("weight", "bias") for n in (names["gate"], names["up"]))):
            if name in state:
                state[name] = state[name][kept_I].clone()
        state[names["down"]] = state[names["down"]][:, kept_I].clone()
    return smaller_model(model, config, state)


def prune_weights(model: ByteTransformer, ratio: float) -> None:
    """Set the share `ratio` of least magnitude of every matrix of the layers to 0, in place; shapes stay.

    Raises:
        ValueError: ratio is not at least 0 and less than 1.
    """
    _check(ratio)
    for name in sorted(matrix_names(model.config) - {"lm_head.weight"}):
        path, _, parameter = name.rpartition(".")
        module = model.get_submodule(path)
        prune.l1_unstructured(module, parameter, amount=ratio)
        prune.remove(module, parameter)


def _check(ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio ({ratio}) must be at least 0 and less than 1")
