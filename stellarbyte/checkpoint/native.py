"""Checks and loads a ByteTransformer checkpoint folder.

config.json  generation_config.json  model.safetensors (or shards and model.safetensors.index.json)
tokenizer.json  tokenizer_config.json  chat_template.jinja (if the model has one)
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import GenerationConfig

from stellarbyte.checkpoint.errors import CheckpointError, one_line
from stellarbyte.checkpoint.quantized.matrix import QuantizedMatrix, StoredMatrix, stored_matrices, with_quantized
from stellarbyte.checkpoint.safetensors_file import (
    DTYPES,
    TensorInfo,
    read_headers,
    read_json,
    read_pieces,
    read_tensor,
    read_tensors,
)
from stellarbyte.checkpoint.shapes import expected_shapes, matrix_names
from stellarbyte.config import ByteModelConfig
from stellarbyte.model.decoder import ByteLanguageModel
from stellarbyte.model.parts import Shape

if TYPE_CHECKING:
    from stellarbyte.model.transformer import ByteTransformer


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder whose config and safetensors headers agree with each other; no weight has been read."""

    path: Path
    config: ByteModelConfig
    tensors: Mapping[str, TensorInfo]
    quantized: Mapping[str, StoredMatrix]  # by the name of the parameter; their tensors are among `tensors`

    @property
    def files(self) -> list[Path]:
        return sorted({info.file for info in self.tensors.values()})

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in expected_shapes(self.config).values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight files on disk."""
        return sum(file.stat().st_size for file in self.files)


def load_config(path: str | os.PathLike[str]) -> ByteModelConfig:
    """The config of a checkpoint folder.

    Raises:
        CheckpointError: no folder, no config.json, not JSON, another model's, or values that contradict each other.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder." if folder.exists() else f"{folder} does not exist.")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no config.json.")
    content = read_json(folder / "config.json")
    model_type = content.get("model_type")
    if model_type != ByteModelConfig.model_type:
        raise CheckpointError(
            f"{folder} holds a model of type {model_type!r}, not a ByteTransformer; "
            f"convert it first: stellarbyte convert {folder} DST."
        )
    try:
        return ByteModelConfig.from_dict(content)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is not valid: {one_line(error)}.") from error


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Check a checkpoint folder as far as possible without reading its weights; takes milliseconds.

    Raises:
        CheckpointError: as `load_config`; a missing, truncated or corrupt weight file; tensors that are missing,
            unexpected, of another shape, or not of a float type.
    """
    config = load_config(path)
    tensors = read_headers(Path(path))
    quantized = stored_matrices(tensors, matrix_names(config))
    shapes = with_quantized({name: info.shape for name, info in tensors.items()}, quantized)
    check_tensors(Path(path), expected_shapes(config), shapes)
    for name in shapes.keys() - quantized.keys():
        if (info := tensors[name]).dtype not in DTYPES:
            raise CheckpointError(f"{info.file} holds {name} as {info.dtype}, not one of {', '.join(DTYPES)}.")
    return Checkpoint(path=Path(path), config=config, tensors=tensors, quantized=quantized)


def check_tensors(source: Path, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Raise CheckpointError unless the tensors are exactly those that the config implies."""
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(f"{source} lacks {_listed(missing)}, which the config implies.")
    if unexpected := [name for name in found if name not in expected]:
        raise CheckpointError(f"{source} holds {_listed(unexpected)}, which the config does not imply.")
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(f"{source} holds {name} as {list(found[name])}; the config implies {list(shape)}.")


def _listed(names: list[str]) -> str:
    others = len(names) - 1
    return f"{names[0]} and {others} other tensor{'s' * (others > 1)}" if others else f"the tensor {names[0]}"


def load_model(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> "ByteTransformer":
    """The transformers model in evaluation mode, with the folder's generation config.

    Parameters, arguments and errors as in `load_language_model`.
    """
    from stellarbyte.model.transformer import ByteTransformer  # takes seconds to import; servers do not need it

    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = ByteTransformer(checkpoint.config)
    _read_weights(checkpoint, model, dtype, device)
    model.tie_weights()
    model.config.dtype = model.dtype
    if (checkpoint.path / "generation_config.json").is_file():
        model.generation_config = _generation_config(checkpoint.path)
    return model


def load_language_model(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> ByteLanguageModel:
    """The bare model in evaluation mode, with parameters directly from the files.

    On the CPU and in the stored dtype, the parameters are memory maps of the files: nothing is copied, pages are read
    on first use, and the files must not be changed in place while the model exists.

    Quantized matrices are dequantized, one at a time.

    Args:
        dtype: of every parameter; None: as stored, float32 where some are quantized.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = ByteLanguageModel(checkpoint.config)
    _read_weights(checkpoint, model, dtype, device)
    return model


def load_quantized(
    path: str | os.PathLike[str], *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[ByteLanguageModel, dict[str, QuantizedMatrix]]:
    """As `load_language_model`, but quantized matrices are returned by the names of their parameters, which have no
    memory (the meta device): for backends that multiply with them as they are.

    The matrices are on the CPU, memory maps of the files.
    """
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = ByteLanguageModel(checkpoint.config)
    matrices = {name: stored.read() for name, stored in checkpoint.quantized.items()}
    state = {name: tensor.to(device=device, dtype=dtype) for name, tensor in _plain_weights(checkpoint)}
    for name, stored in checkpoint.quantized.items():
        state[name] = torch.empty(stored.shape, dtype=dtype, device="meta")
    adopt_weights(checkpoint.config, model, state)
    return model, matrices


def _plain_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters that are not quantized, as stored."""
    plain = expected_shapes(checkpoint.config).keys() - checkpoint.quantized.keys()
    for file in checkpoint.files:
        yield from read_tensors(file, plain)


def read_parts(
    checkpoint: Checkpoint, indices: Mapping[str, tuple[slice, ...]], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Parts of parameters, each with memory of its own, unless it is whole and stored in `dtype`.

    Of a quantized matrix only the rows of the part are dequantized; other parameters are not read beyond it.

    Args:
        indices: of the first dimensions of each parameter, by its name; (): all of it.

    Raises:
        CheckpointError: a file cannot be read.
    """
    yield from read_plain_parts(checkpoint, indices, dtype)
    for name, stored in checkpoint.quantized.items():
        rows, *others = indices[name] or (slice(None),)
        yield name, stored.read()[rows].dequantized()[:, *others].to(dtype).contiguous()


def read_plain_parts(
    checkpoint: Checkpoint, indices: Mapping[str, tuple[slice, ...]], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """As `read_parts`, without the quantized matrices."""
    for file in checkpoint.files:
        for name, tensor in read_pieces(file, indices):
            yield name, tensor.to(dtype)


def read_parameter(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """One whole parameter, as stored or dequantized to float32.

    Raises:
        CheckpointError: its file cannot be read.
    """
    if (stored := checkpoint.quantized.get(name)) is not None:
        return stored.read().dequantized()
    return read_tensor(name, checkpoint.tensors[name])


def _read_weights(
    checkpoint: Checkpoint, model: nn.Module, dtype: torch.dtype | None, device: torch.device | str
) -> None:
    """Set the parameters of a model built on the meta device, without gradients, and put it in evaluation mode."""
    wanted = dtype
    if wanted is None:  # in 16 bits, quantized matrices would be rounded once more
        wanted = torch.float32 if checkpoint.quantized else stored_dtype(checkpoint)
    state = {name: tensor.to(device=device, dtype=wanted) for name, tensor in _plain_weights(checkpoint)}
    for name, stored in checkpoint.quantized.items():
        state[name] = stored.read().to(device).dequantized().to(wanted)
    adopt_weights(checkpoint.config, model, state)


def adopt_weights(config: ByteModelConfig, model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """As `_read_weights`, from given tensors, which must be those of `expected_shapes`."""
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(False).eval()


def read_generation(folder: Path) -> dict[str, Any]:
    """generation_config.json, {} if absent. A negative top_k, which means all tokens in other programs, becomes 0.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    file = folder / "generation_config.json"
    content = read_json(file) if file.is_file() else {}
    top_k = content.get("top_k")
    return content | {"top_k": 0} if isinstance(top_k, int) and top_k < 0 else content


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_dict(read_generation(folder))
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / 'generation_config.json'} is not valid: {one_line(error)}.") from error


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the embedding, which counts as the checkpoint's dtype."""
    return DTYPES[checkpoint.tensors["model.embed_tokens.weight"].dtype]
