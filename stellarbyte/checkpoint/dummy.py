"""Random weights of the shape that a config.json describes, for benchmarks."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch

from stellarbyte.checkpoint.native import adopt_weights, load_config
from stellarbyte.checkpoint.safetensors_file import read_json
from stellarbyte.checkpoint.shapes import expected_shapes
from stellarbyte.config import ByteModelConfig
from stellarbyte.model.decoder import ByteLanguageModel

SEED = 0


def dummy_config(folder: Path) -> ByteModelConfig:
    """The config of a folder, which needs no other file: a ByteTransformer's, or one that can be converted.

    Raises:
        CheckpointError: config.json is missing, invalid, or of an unsupported model.
    """
    file = folder / "config.json"
    if not file.is_file() or read_json(file).get("model_type") == ByteModelConfig.model_type:
        return load_config(folder)
    from stellarbyte.checkpoint.hugging_face.folder import read_config, refuse_unsupported  # takes seconds

    refuse_unsupported(folder)
    return read_config(folder, headers={})


def dummy_weights(
    config: ByteModelConfig, *, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter, drawn on the device one after the other; the same weights every time.

    Matrices and biases are normal with `initializer_range`; norms multiply by 1; scales of layers are at their start.
    """
    numbers = torch.Generator(device).manual_seed(SEED)
    for name, shape in expected_shapes(config).items():
        weight = torch.empty(shape, dtype=dtype, device=device)
        if name.endswith("norm.weight"):
            weight.fill_(0.0 if config.zero_centered_norms else 1.0)
        elif name.endswith("_scale.weight"):
            weight.fill_(1.0 if config.layer_scale_init is None else config.layer_scale_init)
        else:
            weight.normal_(0.0, config.initializer_range, generator=numbers)
        yield name, weight


def dummy_language_model(config: ByteModelConfig, *, dtype: torch.dtype, device: torch.device) -> ByteLanguageModel:
    """The bare model in evaluation mode, of `dummy_weights`, with decays at their start."""
    with torch.device("meta"):
        model = ByteLanguageModel(config)
    adopt_weights(config, model, dict(dummy_weights(config, dtype=dtype, device=device)))
    model.model.rotary.reset_parameters()
    return model


def dummy_hash(folder: Path) -> str:
    """A substitute for the weights' hash: "dummy-" and the SHA-256 (hex) of config.json."""
    return "dummy-" + hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
