"""Quantized matrices as ByteTransformer checkpoints keep them: integers or fp8, with scales for groups of columns.

A parameter NAME is stored as NAME.codes, NAME.scales and, for int4, NAME.zeros instead of NAME; the dtype of the codes
is the kind. So a checkpoint's headers describe it completely.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.safetensors_file import TensorInfo, read_tensor
from stellarbyte.model.parts import Shape

# E experts or nothing, N outputs, K inputs, G groups of K / G neighbouring inputs

Kind = Literal["int4", "int8", "fp8"]
KINDS: Mapping[str, Kind] = {"U8": "int4", "I8": "int8", "F8_E4M3": "fp8"}  # by the dtype of the codes
CODES, SCALES, ZEROS = ".codes", ".scales", ".zeros"


@dataclass(frozen=True, kw_only=True)
class QuantizedMatrix:
    """One matrix, or a stack of them with a leading dimension.

    Attributes:
        codes: int4: uint8 [N, K / 2], columns 2i (low bits) and 2i + 1 of a byte; int8: int8 [N, K]; fp8: float8_e4m3fn
            [N, K].
        scales: float16, bfloat16 or float32 [N, G].
        zeros: [N, G], of int4 only: uint8, or float16 where they lie between codes.
    """

    kind: Kind
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    @property
    def shape(self) -> Shape:
        """Of the numbers."""
        return (*self.codes.shape[:-1], self.num_columns)

    @property
    def num_columns(self) -> int:
        return self.codes.shape[-1] * (2 if self.kind == "int4" else 1)

    @property
    def group_size(self) -> int:
        return self.num_columns // self.scales.shape[-1]

    def unpacked_codes(self) -> torch.Tensor:
        """The codes [N, K] as stored; int4 one in a byte."""
        if self.kind != "int4":
            return self.codes
        return torch.stack((self.codes & 15, self.codes >> 4), dim=-1).flatten(-2)

    def dequantized(self) -> torch.Tensor:
        """float32 [N, K]: scale · (code - zero). Exact for integers with scales of 16 bits, else rounded once."""
        numbers = self.unpacked_codes().float().unflatten(-1, (self.scales.shape[-1], self.group_size))
        if self.zeros is not None:
            numbers = numbers - self.zeros.float()[..., None]
        return (numbers * self.scales.float()[..., None]).flatten(-2)

    def to(self, device: torch.device | str) -> "QuantizedMatrix":
        zeros = None if self.zeros is None else self.zeros.to(device)
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device), zeros=zeros)

    def columns(self, start: int, stop: int) -> "QuantizedMatrix":
        """Some of the columns, of int4 an even number from an even one on. Groups that are cut become smaller ones."""
        per_byte, width = (2 if self.kind == "int4" else 1), self.group_size
        assert start % per_byte == stop % per_byte == 0
        codes = self.codes[..., start // per_byte : stop // per_byte].contiguous()
        if self.scales.shape[-1] == 1:
            return replace(self, codes=codes)
        size = math.gcd(width, start, stop)

        def of_groups(numbers: torch.Tensor) -> torch.Tensor:
            return numbers.repeat_interleave(width // size, dim=-1)[..., start // size : stop // size].contiguous()

        zeros = None if self.zeros is None else of_groups(self.zeros)
        return replace(self, codes=codes, scales=of_groups(self.scales), zeros=zeros)

    def __getitem__(self, index: int | slice) -> "QuantizedMatrix":
        """One matrix of a stack, or some; of a matrix that is no stack, some rows."""
        zeros = None if self.zeros is None else self.zeros[index]
        return replace(self, codes=self.codes[index], scales=self.scales[index], zeros=zeros)


@dataclass(frozen=True, kw_only=True)
class StoredMatrix:
    """The entries of a quantized matrix in headers, checked against each other."""

    name: str
    kind: Kind
    shape: Shape  # of the parameter
    group_size: int
    tensors: Mapping[str, TensorInfo]  # by CODES, SCALES and ZEROS

    def read(self) -> QuantizedMatrix:
        """Raises CheckpointError."""
        read = {ending: read_tensor(f"{self.name}{ending}", info) for ending, info in self.tensors.items()}
        return QuantizedMatrix(kind=self.kind, codes=read[CODES], scales=read[SCALES], zeros=read.get(ZEROS))


def stored_matrices(headers: Mapping[str, TensorInfo], may_be_quantized: Collection[str]) -> dict[str, StoredMatrix]:
    """The quantized matrices of a checkpoint, by the names of the parameters.

    Args:
        may_be_quantized: the parameters that backends read as matrices.

    Raises:
        CheckpointError: dtypes or shapes do not fit each other, or a part is missing; the message names the tensor.
    """
    found: dict[str, StoredMatrix] = {}
    for codes_name, codes in headers.items():
        name = codes_name.removesuffix(CODES)
        if name == codes_name:
            continue
        kind = KINDS.get(codes.dtype)
        endings = (CODES, SCALES, ZEROS) if kind == "int4" else (CODES, SCALES)
        if kind is None:
            raise CheckpointError(f"{codes.file} holds {codes_name} as {codes.dtype}, not one of {', '.join(KINDS)}.")
        if name not in may_be_quantized:
            raise CheckpointError(f"{codes.file} holds {codes_name}; this parameter cannot be quantized.")
        if missing := [ending for ending in endings if f"{name}{ending}" not in headers]:
            raise CheckpointError(f"{codes.file} lacks the tensor {name}{missing[0]}, of which it holds the codes.")
        if name in headers:
            raise CheckpointError(f"{codes.file} holds {codes_name}, but {name} is there, too.")
        tensors = {ending: headers[f"{name}{ending}"] for ending in endings}
        width = codes.shape[-1] * (2 if kind == "int4" else 1) if codes.shape else 0
        scales = tensors[SCALES]
        num_groups = scales.shape[-1] if scales.shape else 0
        if (
            scales.dtype not in ("F32", "F16", "BF16")
            or scales.shape[:-1] != codes.shape[:-1]
            or not num_groups
            or width % num_groups
        ):
            raise CheckpointError(
                f"{scales.file} holds {name}{SCALES} as {scales.dtype} {list(scales.shape)}, which does not fit codes "
                f"of {list(codes.shape)}."
            )
        zeros = tensors.get(ZEROS)
        if zeros is not None and (zeros.dtype not in ("U8", "F16") or zeros.shape != scales.shape):
            raise CheckpointError(
                f"{zeros.file} holds {name}{ZEROS} as {zeros.dtype} {list(zeros.shape)}; it must be U8 or F16 "
                f"{list(scales.shape)}."
            )
        shape = (*codes.shape[:-1], width)
        found[name] = StoredMatrix(
            name=name, kind=kind, shape=shape, group_size=width // num_groups, tensors=tensors
        )  # fmt: skip
    return found


def with_quantized(shapes: Mapping[str, Shape], matrices: Mapping[str, StoredMatrix]) -> dict[str, Shape]:
    """The shapes of parameters, of those of all tensors."""
    parts = {f"{name}{ending}" for name, matrix in matrices.items() for ending in matrix.tensors}
    plain = {name: shape for name, shape in shapes.items() if name not in parts}
    return plain | {name: matrix.shape for name, matrix in matrices.items()}
