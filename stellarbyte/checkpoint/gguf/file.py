"""Reads a GGUF file (versions 2 and 3, little-endian) strictly.

The gguf package's own reader checks no bounds: a truncated file gives IndexErrors, or arrays that are too short. It
also makes two numpy views for every token of a vocabulary, which takes seconds. This reader needs a tenth of a second
and refuses inconsistent files; types and dequantisation are the package's.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from stellarbyte.checkpoint.errors import CheckpointError

VERSIONS = (2, 3)
FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_QUANT_NAMES = (
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)
QUANTS = tuple(GGMLQuantizationType[name] for name in _QUANT_NAMES)
SUPPORTED_TYPES = (*FLOATS, *QUANTS)

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_MAX_DIMS = 4


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """One tensor's place in the file; `shape` is in torch's order (the file's reversed)."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        block_elements, block_bytes = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block_elements * block_bytes

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `GGUFFile.read`: the stored float type, or float32 for quantised blocks."""
        return FLOATS.get(self.type, torch.float32)


@dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """Metadata and tensor table of an open file; every tensor lies inside the file and has a supported type."""

    path: Path
    content: mmap.mmap
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    def read(self, name: str) -> torch.Tensor:
        """A copy of one tensor: floats as stored, blocks dequantised to float32."""
        tensor = self.tensors[name]
        raw = np.frombuffer(self.content, np.uint8, tensor.num_bytes, tensor.start)
        if tensor.type in FLOATS:
            return torch.from_numpy(raw.copy()).view(FLOATS[tensor.type]).reshape(tensor.shape)
        block_elements, block_bytes = GGML_QUANT_SIZES[tensor.type]
        rows = raw.reshape(-1, tensor.shape[-1] // block_elements * block_bytes)
        return torch.from_numpy(dequantize(rows, tensor.type)).reshape(tensor.shape)


def open_gguf(path: Path) -> GGUFFile:
    """Read a file's metadata and tensor table.

    Raises:
        CheckpointError: not a GGUF file, truncated, corrupt, or with an unsupported tensor type.
    """
    try:
        with path.open("rb") as stream:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        reason = error.strerror if isinstance(error, OSError) else "it is empty"
        raise CheckpointError(f"{path} cannot be read: {reason}.") from error
    cursor = _Cursor(path, content)
    if cursor.take(4) != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file.")
    version = cursor.number("I")
    if version not in VERSIONS:
        is_swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        kind = "a big-endian GGUF file" if is_swapped else f"GGUF version {version}"
        raise CheckpointError(f"{path} is {kind}; versions 2 and 3 in little-endian are supported.")
    num_tensors, num_fields = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_fields):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    entries = [_read_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise CheckpointError(f"{path} is corrupt: its alignment is {alignment!r}.")
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {entry[0]: _place(path, len(content), data_start, *entry) for entry in entries}
    if len(tensors) != len(entries):
        raise CheckpointError(f"{path} is corrupt: two of its tensors have the same name.")
    return GGUFFile(path=path, content=content, metadata=metadata, tensors=tensors)


def _read_entry(cursor: "_Cursor") -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of one tensor."""
    name = cursor.string()
    num_dims = cursor.number("I")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise CheckpointError(f"{cursor.path} is corrupt: tensor {name!r} has {num_dims} dimensions.")
    shape = tuple(cursor.number("Q") for _ in range(num_dims))
    return name, shape[::-1], cursor.number("I"), cursor.number("Q")


def _place(
    path: Path, size: int, data_start: int, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> GGUFTensor:
    try:
        tensor_type = GGMLQuantizationType(kind)
    except ValueError:
        raise CheckpointError(f"{path} holds {name} in the unknown tensor type {kind}.") from None
    if tensor_type not in SUPPORTED_TYPES:
        supported = ", ".join(supported_type.name for supported_type in SUPPORTED_TYPES)
        raise CheckpointError(f"{path} holds {name} as {tensor_type.name}; supported are {supported}.")
    tensor = GGUFTensor(name=name, type=tensor_type, shape=shape, start=data_start + offset)
    if shape[-1] % GGML_QUANT_SIZES[tensor_type][0]:
        raise CheckpointError(f"{path} is corrupt: rows of {name} are no whole number of {tensor_type.name} blocks.")
    if tensor.start + tensor.num_bytes > size:
        raise CheckpointError(f"{path} is cut short: {name} ends at byte {tensor.start + tensor.num_bytes} of {size}.")
    return tensor


class _Cursor:
    """Reads forwards through the mapped file, never past its end."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path = path
        self.position = 0
        self._content = content
        self._size = len(content)

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > self._size:
            raise CheckpointError(f"{self.path} is cut short or corrupt: its header runs past the end of the file.")
        piece = self._content[self.position : end]
        self.position = end
        return piece

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path} is corrupt: its header holds text that is not UTF-8.") from error

    def value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[GGUFValueType(kind)])
        if kind != GGUFValueType.ARRAY:
            raise CheckpointError(f"{self.path} is corrupt: its header holds a value of unknown type {kind}.")
        element, count = self.number("I"), self.number("Q")
        if element in _SCALARS:
            code = _SCALARS[GGUFValueType(element)]
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}"))))
        if element == GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        raise CheckpointError(f"{self.path} is corrupt: its header holds an array of type {element}.")
