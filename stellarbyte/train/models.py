"""The model that a run trains: new, from a checkpoint, or with an adapter."""

from collections.abc import Mapping
from typing import Any

import torch

from stellarbyte.checkpoint.native import adopt_weights, load_config, load_model
from stellarbyte.checkpoint.source import resolve_model
from stellarbyte.config import ByteModelConfig
from stellarbyte.lora import LoRAConfig, apply_lora_to_model
from stellarbyte.model.transformer import ByteTransformer
from stellarbyte.train.config.presets import PRESETS
from stellarbyte.train.config.run import LoraRun, Model, Pretrain, Sft
from stellarbyte.train.errors import TrainError
from stellarbyte.train.rows import RunData


def make_model(config: Pretrain | Sft | LoraRun, data: RunData) -> ByteTransformer:
    """In float32, as optimizers need it; with an adapter, its parameters alone are trainable.

    Raises:
        TrainError: the shape is impossible, or the model does not fit the data.
        CheckpointError: the checkpoint cannot be read.
    """
    model = _new(config, data) if config.model.path is None else _loaded(config.model, config.model.path, data)
    has_biases, rate = model.config.router_selection_bias, config.train.balance_rate
    if rate is not None and not has_biases:
        raise TrainError("train.balance_rate needs model.router_selection_bias: true.")
    if rate is None and has_biases and config.model.path is None:
        raise TrainError("train.balance_rate is missing: it moves the biases of model.router_selection_bias.")
    shift, context = config.data.position_shift, model.config.max_position_embeddings
    if config.data.sequence + shift > context:
        shifted = f" and data.position_shift ({shift}) are" if shift else " is"
        raise TrainError(
            f"data.sequence ({config.data.sequence}){shifted} beyond the model's context of {context} tokens "
            "(max_position_embeddings)."
        )
    if isinstance(config, LoraRun):
        lora = config.lora
        try:
            settings = LoRAConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=lora.target_modules,
                use_rslora=lora.rslora,
                use_dora=lora.dora,
                alora_invocation_tokens=data.invocation,
            )
            apply_lora_to_model(model, settings)
        except ValueError as error:
            raise TrainError(f"lora: {error}.") from error
    if config.train.recompute_every is not None:
        model._set_gradient_checkpointing(every_n_layers=config.train.recompute_every)
    return model


def model_config(config: Pretrain | Sft | LoraRun, data: RunData) -> ByteModelConfig:
    """Of the model that the run trains; reads no weights. Raises as `make_model`."""
    if config.model.path is not None:
        found = load_config(resolve_model(config.model.path))
        return ByteModelConfig.from_dict(found.to_dict() | config.model.fields)
    shape = {} if config.model.preset is None else PRESETS[config.model.preset]
    fields = shape | config.model.fields | {"vocab_size": data.vocab_size, **data.special_ids}
    try:
        return ByteModelConfig(**fields)
    except (ValueError, TypeError) as error:
        raise TrainError(f"model: {' '.join(str(error).split()).rstrip('.')}.") from error


def _new(config: Pretrain | Sft, data: RunData) -> ByteTransformer:
    return ByteTransformer(model_config(config, data))


def _loaded(settings: Model, path: str, data: RunData) -> ByteTransformer:
    model = load_model(resolve_model(path), dtype=torch.float32)
    if model.config.vocab_size < data.vocab_size:
        raise TrainError(
            f"The data's tokenizer has {data.vocab_size} tokens, the model at {path} only {model.config.vocab_size}."
        )
    if settings.fields:
        model = _with_fields(model, settings.fields)
    model.requires_grad_(True)
    return model


def _with_fields(model: ByteTransformer, fields: Mapping[str, Any]) -> ByteTransformer:
    """The same weights in a model whose config differs in fields that change no weight."""
    settings = ByteModelConfig.from_dict(model.config.to_dict() | dict(fields))
    with torch.device("meta"):
        changed = ByteTransformer(settings)
    adopt_weights(settings, changed, dict(model.state_dict()))
    changed.tie_weights()
    changed.generation_config = model.generation_config
    return changed
