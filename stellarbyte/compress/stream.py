"""Runs a model layer by layer over whole contexts: one layer at a time is in float32."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from stellarbyte.config import ByteModelConfig
from stellarbyte.model.attention import plain_projection
from stellarbyte.model.decoder import ByteDecoderLayer, ByteLanguageModel
from stellarbyte.model.dense_attention import DenseAttention
from stellarbyte.model.moe.layer import ByteMoE
from stellarbyte.model.positions import positions_of
from stellarbyte.model.transformer import ByteTransformer

# B contexts, T tokens, C hidden size

AnyModel = ByteLanguageModel | ByteTransformer  # both have `model` and `lm_head`
Batches = list[torch.Tensor]  # hidden states [B, T, C]
Advance = Callable[[int], None]  # called after each layer with its number

CONTEXTS_AT_ONCE = 8


@torch.no_grad()
def embedded(model: AnyModel, contexts_BT: torch.Tensor) -> Batches:
    """What the first layer reads, float32."""
    decoder = model.model
    batches = []
    for ids_BT in contexts_BT.split(CONTEXTS_AT_ONCE) if len(contexts_BT) else ():
        rows = decoder.embed_tokens(ids_BT)
        if decoder.embedding_multiplier != 1:
            rows = rows * rows.new_tensor(decoder.embedding_multiplier)
        batches.append(rows.float())
    return batches


def attention_of(model: AnyModel, config: ByteModelConfig, batch: torch.Tensor) -> DenseAttention:
    """Of whole contexts as in `batch`."""
    positions = positions_of(
        batch, None, None, None, cache=None, memory=None, context=config.max_position_embeddings
    )  # fmt: skip
    return DenseAttention(
        config, model.model.rotary, positions, cache=None, memory=None, implementation="sdpa", dropout=0.0
    )


@torch.no_grad()
def run_layer(
    model: AnyModel, config: ByteModelConfig, layer: ByteDecoderLayer, batches: Sequence[torch.Tensor]
) -> Batches:
    """The outputs of a layer for its inputs."""
    return [layer(batch, attention_of(model, config, batch), plain_projection)[0] for batch in batches]


def decoder_layers(model: AnyModel) -> Iterator[tuple[ByteDecoderLayer, list[nn.Module]]]:
    """Each layer, with all modules that computing it reads: experts may be another layer's."""
    for layer in model.model.layers:
        assert isinstance(layer, ByteDecoderLayer)
        held = layer.mlp._holder if isinstance(layer.mlp, ByteMoE) else []
        yield layer, [layer, *held]


@contextmanager
def in_float32(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Parameters in float32; afterwards they are the stored ones again."""
    stored = [(parameter, parameter.data) for module in modules for parameter in module.parameters()]
    for module in modules:
        module.float()
    try:
        yield
    finally:
        for parameter, numbers in stored:
            parameter.data = numbers


@torch.no_grad()
def last_states(model: AnyModel, config: ByteModelConfig, contexts_BT: torch.Tensor, advance: Advance) -> Batches:
    """Hidden states after the final norm, float32, of a model that does not change."""
    batches = embedded(model, contexts_BT)
    for number, (layer, modules) in enumerate(decoder_layers(model)):
        with in_float32(modules):
            batches = run_layer(model, config, layer, batches)
        advance(number)
    return finished(model, batches)


@torch.no_grad()
def finished(model: AnyModel, batches: Batches) -> Batches:
    """After the final norm."""
    with in_float32([model.model.norm]):
        return [model.model.norm(batch) for batch in batches]
