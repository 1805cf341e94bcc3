"""Modules of a decoder layer, built from the table of its parts."""

import torch
from torch import nn

from stellarbyte.config import ByteModelConfig
from stellarbyte.model import parts
from stellarbyte.model.norm import ByteRMSNorm
from stellarbyte.model.residual import LayerScale, deepnorm_beta


def add_parts(owner: nn.Module, prefix: str, config: ByteModelConfig, layer: int) -> None:
    """Add a module's parts as children; parts that this layer lacks become None.

    Args:
        prefix: the owner's name in the layer, such as "self_attn"; "" for the layer itself.
    """
    for part in parts.PARTS:
        path, _, name = part.name.rpartition(".")
        if path == prefix:
            built = _build(part, config, layer) if part.exists(config, layer) else None
            if part.kind == "parameter":
                assert built is None or isinstance(built, nn.Parameter)
                owner.register_parameter(name, built)
            else:
                setattr(owner, name, built)


def _build(part: parts.Part, config: ByteModelConfig, layer: int) -> nn.Module | nn.Parameter:
    shape = part.shape(config, layer)
    if part.kind == "parameter":
        return nn.Parameter(torch.empty(shape))  # its owner's case in `_init_weights` fills it
    if part.kind == "norm":
        return ByteRMSNorm(shape[0], config.rms_norm_eps, zero_centered=config.zero_centered_norms)
    if part.kind == "scale":
        assert config.layer_scale_init is not None
        return LayerScale(shape[0], config.layer_scale_init)
    out, width = shape
    linear = nn.Linear(width, out, bias=part.has_bias(config, layer))
    if part.has_deepnorm_gain:
        linear.init_gain = deepnorm_beta(config)  # type: ignore[assignment]  # read by `_init_weights`
    return linear
