"""Conversion of a Hugging Face folder or a GGUF file into a ByteTransformer checkpoint."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.gguf.model import plan_gguf
from stellarbyte.checkpoint.hugging_face.folder import plan_folder
from stellarbyte.checkpoint.native import check_tensors
from stellarbyte.checkpoint.plan import ConversionPlan, PlannedTensor
from stellarbyte.checkpoint.progress import Progress
from stellarbyte.checkpoint.quantized.matrix import CODES, SCALES, ZEROS, stored_matrices, with_quantized
from stellarbyte.checkpoint.safetensors_file import (
    DTYPE_NAMES,
    INDEX_FILE,
    QUANTIZED_FILE,
    QUANTIZED_INDEX_FILE,
    SINGLE_FILE,
    TensorInfo,
    write_file,
)
from stellarbyte.checkpoint.shapes import expected_shapes, matrix_names
from stellarbyte.checkpoint.staging import refuse_existing, staged_folder
from stellarbyte.checkpoint.vocabulary import mismatch
from stellarbyte.checkpoint.weights_hash import keep_hashes

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 4 * 1024**3
_SPARE_BYTES = 64 * 1024**2  # for the tokenizer and the other small files


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write `source` as a ByteTransformer checkpoint into the new folder `target`, completely or not at all.

    One tensor at a time is in memory. Logs a warning if the tokenizer has tokens without an embedding in the model.

    Args:
        source: a Hugging Face folder of one of `hugging_face.folder.MODEL_TYPES`, or a GGUF file of one of
            `gguf.families.FAMILIES`.
        dtype: of the target; None: as stored, with quantized matrices kept where a checkpoint can hold the same
            numbers, MXFP4 as bfloat16, and float32 for what is quantized in another way.
        progress: called after each tensor.

    Returns:
        `target`.

    Raises:
        CheckpointError: anything is missing, corrupt or not supported (checked before writing), the target is not
            empty, or the disk is full.
    """
    target = Path(target)
    refuse_existing(target)
    plan = make_plan(Path(source), dtype)
    write_checkpoint(plan, target, progress=progress, max_shard_bytes=max_shard_bytes)
    for note in () if plan.origin is None else plan.origin.notes:
        logger.warning("warning: %s: %s.", source, note)
    return target


def write_checkpoint(
    plan: ConversionPlan,
    target: Path,
    *,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    add_files: Callable[[Path], None] = lambda _folder: None,
) -> None:
    """Write a plan into the new folder `target`, its tensors in the plan's order, completely or not at all.

    Args:
        add_files: writes other files into a given folder, once all tensors are written.

    Raises:
        CheckpointError: the target is not empty, or the disk is full.
    """
    refuse_existing(target)
    _require_space(target, sum(tensor.num_bytes for tensor in plan.tensors.values()))
    with staged_folder(target) as staging:
        plan.config.save_pretrained(staging)
        _write_json(staging / "generation_config.json", plan.generation)
        if plan.origin is not None:
            plan.origin.write(staging)
        plan.write_tokenizer(staging)
        _warn_of_mismatch(staging, plan.config.vocab_size)
        hashes = _write_weights(staging, plan, max_shard_bytes, progress)
        add_files(staging)
    keep_hashes(target, hashes)


def _warn_of_mismatch(folder: Path, vocab_size: int) -> None:
    message = mismatch(Tokenizer.from_file(str(folder / "tokenizer.json")), vocab_size)
    if message is not None:
        logger.warning("warning: %s", message)


def make_plan(source: Path, dtype: torch.dtype | None = None) -> ConversionPlan:
    """The plan of converting `source`; its tensors are exactly those that its config implies, in the model's order.
    Writes nothing."""
    if source.is_dir():
        plan = plan_folder(source, dtype)
    elif source.is_file():
        plan = plan_gguf(source, dtype)
    else:
        raise CheckpointError(f"{source} does not exist.")
    headers = {
        name: TensorInfo(file=source, dtype=DTYPE_NAMES[tensor.dtype], shape=tensor.shape)
        for name, tensor in plan.tensors.items()
    }
    quantized = stored_matrices(headers, matrix_names(plan.config))
    shapes = with_quantized({name: info.shape for name, info in headers.items()}, quantized)
    expected = expected_shapes(plan.config)
    check_tensors(source, expected, shapes)
    plan.config.architectures = ["ByteTransformer"]
    names = [f"{name}{ending}" for name in expected for ending in ("", CODES, SCALES, ZEROS)]
    return replace(plan, tensors={name: plan.tensors[name] for name in names if name in plan.tensors})


def _require_space(target: Path, num_bytes: int) -> None:
    folder = next(parent for parent in target.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < num_bytes + _SPARE_BYTES:
        raise CheckpointError(
            f"{target} needs {num_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free in {folder}."
        )


def _write_weights(
    folder: Path, plan: ConversionPlan, max_shard_bytes: int, progress: Progress | None
) -> dict[str, str]:
    """Returns the SHA-256 of each file, by its name."""
    shards = _shards(plan, max_shard_bytes)
    total = sum(tensor.num_bytes for tensor in plan.tensors.values())
    written = 0

    def read(shard: dict[str, PlannedTensor]) -> Iterator[torch.Tensor]:
        nonlocal written
        for tensor in shard.values():
            yield tensor.read()
            written += tensor.num_bytes
            if progress is not None:
                progress(written, total)

    is_quantized = any(name.endswith(CODES) for name in plan.tensors)
    single, index_file = (QUANTIZED_FILE, QUANTIZED_INDEX_FILE) if is_quantized else (SINGLE_FILE, INDEX_FILE)
    names = [single]
    if len(shards) > 1:
        stem = single.removesuffix(".safetensors")
        names = [f"{stem}-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
    hashes = {}
    for name, shard in zip(names, shards, strict=True):
        layout = {key: (tensor.dtype, tensor.shape) for key, tensor in shard.items()}
        hashes[name] = write_file(folder / name, layout, read(shard))
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / index_file, index)
    return hashes


def _shards(plan: ConversionPlan, max_bytes: int) -> list[dict[str, PlannedTensor]]:
    """The tensors in shards of at most `max_bytes`."""
    shards: list[dict[str, PlannedTensor]] = [{}]
    size = 0
    for name, tensor in plan.tensors.items():
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.num_bytes
    return shards


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
