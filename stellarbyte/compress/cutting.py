"""Models of which parts are cut out: another config and smaller weights."""

import copy

import torch

from stellarbyte.checkpoint.shapes import expected_shapes
from stellarbyte.config import ByteModelConfig
from stellarbyte.model.transformer import ByteTransformer


def plain_weights(model: ByteTransformer) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint of the model stores.

    Raises:
        ValueError: the model has adapters or quantized layers.
    """
    weights = model.state_dict()
    names = expected_shapes(model.config)
    if not names.keys() <= weights.keys():
        raise ValueError("the model has adapters or quantized layers; prune the original model")
    return {name: weights[name] for name in names}


def smaller_model(
    model: ByteTransformer, config: ByteModelConfig, state: dict[str, torch.Tensor]
) -> ByteTransformer:  # fmt: skip
    """A model of this config with these weights, otherwise as `model`."""
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        small = ByteTransformer(config)
    small.load_state_dict(state, strict=True, assign=True)
    small.tie_weights()
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.train(model.training)
