"""The safetensors format: strict headers, and writing tensor by tensor.

The safetensors package reads tensors lazily, but needs all tensors in memory to write a file. The format (8 bytes of
length, a JSON header, the tensors' bytes) is simple enough to stream.
"""

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from stellarbyte.checkpoint.errors import CheckpointError, one_line

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODE_DTYPES = {"U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}  # of quantized matrices
_WHOLE_DTYPES = {"I32": torch.int32, "I64": torch.int64}  # of other programs' packed codes
DTYPE_NAMES = {dtype: name for name, dtype in (DTYPES | CODE_DTYPES | _WHOLE_DTYPES).items()}
SIZES = {  # bytes of one element, for every dtype of the format with whole bytes
    **{"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# Of a checkpoint with quantized matrices: transformers finds no weights there, instead of making up some.
QUANTIZED_FILE, QUANTIZED_INDEX_FILE = "quantized.safetensors", "quantized.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package itself
MAX_DIMENSIONS = 64


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor's entry in a header; `dtype` is the format's name, such as BF16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * SIZES[self.dtype]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file, checked against the file's size; no tensor is read.

    Raises:
        CheckpointError: the file is missing, truncated or too long, or its header is invalid.
    """
    try:
        with file.open("rb") as stream:
            return {name: info for name, (info, _) in parse_header(stream, file).tensors.items()}
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error


@dataclass(frozen=True, kw_only=True)
class Header:
    """A header, and each tensor's offset after the header."""

    raw: bytes  # the file up to the first tensor
    tensors: dict[str, tuple[TensorInfo, int]]
    payload_bytes: int  # of all tensors: the rest of the file


def parse_header(stream: BinaryIO, file: Path, *, max_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Read the header of an open file, up to its first tensor. Errors name the file `file`.

    Raises:
        CheckpointError: as `read_header`, or the header is larger than `max_bytes`.
        OSError: reading failed.
    """
    size = os.fstat(stream.fileno()).st_size
    prefix = stream.read(8)
    header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
    if not 2 <= header_bytes <= min(size - 8, max_bytes):
        raise CheckpointError(f"{file} is not a safetensors file, or it is cut short: its header does not fit.")
    raw = stream.read(header_bytes)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        spans = {name: _parse_entry(file, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} has a corrupt safetensors header.") from error
    end = 0
    for name, (info, start, stop) in sorted(spans.items(), key=lambda item: item[1][1:]):
        if start != end or stop - start != info.num_bytes:
            raise CheckpointError(f"{file} has a corrupt safetensors header: the bytes of {name!r:.200} do not add up.")
        end = stop
    if 8 + header_bytes + end != size:
        raise CheckpointError(f"{file} has {size} bytes, but its header describes {8 + header_bytes + end}.")
    tensors = {name: (info, start) for name, (info, start, _) in spans.items()}
    return Header(raw=prefix + raw, tensors=tensors, payload_bytes=end)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; duplicate names are refused, because readers would disagree on the value."""
    if len(content := dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _parse_entry(file: Path, entry: dict[str, Any]) -> tuple[TensorInfo, int, int]:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    numbers = (start, stop, *shape)
    if entry["dtype"] not in SIZES or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError(f"impossible entry {entry!r}")
    if len(shape) > MAX_DIMENSIONS:  # the product of millions of numbers would take days
        raise ValueError(f"{len(shape)} dimensions")
    return TensorInfo(file=file, dtype=entry["dtype"], shape=shape), start, stop


def weight_files(folder: Path) -> list[Path]:
    """The files with a folder's tensors: model.safetensors, or the shards that model.safetensors.index.json names; with
    quantized matrices, the same with "quantized" in the place of "model".

    Raises:
        CheckpointError: no weights, or a missing shard.
    """
    if (index := _index_file(folder)) is None:
        for file in (folder / SINGLE_FILE, folder / QUANTIZED_FILE):
            if file.is_file():
                return [file]
        raise CheckpointError(f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} exists.")
    files = [folder / name for name in sorted(set(_weight_map(index).values()))]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; {index.name} names it.")
    return files


def _index_file(folder: Path) -> Path | None:
    """The index that names the weight files; None: there is none."""
    return next((folder / name for name in (INDEX_FILE, QUANTIZED_INDEX_FILE) if (folder / name).is_file()), None)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_plain_name(name) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no usable weight_map.")
    return weight_map


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a folder.

    Raises:
        CheckpointError: as `weight_files` and `read_header`, or a shard disagrees with the index.
    """
    files = weight_files(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        shard = read_header(file)
        if doubled := sorted(shard.keys() & tensors.keys()):
            raise CheckpointError(f"{file} holds {doubled[0]}, which another shard holds too.")
        tensors |= shard
    index = _index_file(folder)
    weight_map = {} if index is None else _weight_map(index)
    if index is not None and (absent := sorted(weight_map.keys() - tensors.keys())):
        raise CheckpointError(f"{folder / weight_map[absent[0]]} does not hold {absent[0]}, as {index.name} says.")
    return tensors


def read_tensor(name: str, info: TensorInfo) -> torch.Tensor:
    """One tensor of a file, a memory map of it.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with safe_open(info.file, framework="pt") as tensors:
            return tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{info.file} cannot be read: {one_line(error)}.") from error


def read_pieces(file: Path, indices: Mapping[str, tuple[slice, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parts of those of the tensors that a file holds; no other bytes are read. (): the whole tensor, a memory map.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                if name in indices:
                    index = indices[name]
                    yield name, tensors.get_slice(name)[index] if index else tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {one_line(error)}.") from error


def read_tensors(file: Path, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of the tensors that a file holds, memory maps of it.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                if name in names:
                    yield name, tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {one_line(error)}.") from error


def _is_plain_name(name: object) -> bool:
    """Whether an index may name this file: it must be inside the folder."""
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) is not None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from `file`.

    Raises:
        CheckpointError: the file is missing, unreadable, or not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold a JSON object.")
    return content


def write_file(
    file: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[torch.Tensor]
) -> str:
    """Stream `tensors`, in the order of `layout`, into a new file; one tensor is in memory at a time.

    Returns:
        SHA-256 of the file, hex.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that the first tensor is aligned for every dtype
    digest = hashlib.sha256()
    with file.open("xb") as stream:
        for piece in (struct.pack("<Q", len(raw)), raw):
            stream.write(piece)
            digest.update(piece)
        for (name, (dtype, shape)), tensor in zip(layout.items(), tensors, strict=True):
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise RuntimeError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, the header says {dtype} {shape}")
            content = tensor.contiguous().flatten().view(torch.uint8).numpy().data
            stream.write(content)
            digest.update(content)
    return digest.hexdigest()
