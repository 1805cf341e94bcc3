"""Quantized matrices in the layout of the kernels for groups of inputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stellarbyte.checkpoint.quantized.matrix import Kind, QuantizedMatrix

# N outputs, K inputs, G groups of K / G neighbouring inputs

SLAB = 32  # inputs of int4 whose codes are adjacent: 16 bytes, as much as a thread reads at once
SYMMETRIC_ZERO = 8  # of int4 without zero points
_KERNEL_GROUPS = (128, 64, 32)  # inputs that a step of the kernels multiplies; larger groups are several of these


@dataclass(frozen=True, kw_only=True)
class GroupedWeight:
    """A matrix [N, K] of numbers scale · (code - zero).

    Attributes:
        codes: int4: uint8 [K / 32, N, 16], where byte i holds inputs i (low bits) and 16 + i of 32; int8 and fp8
            (e4m3): [N, K].
        scales_GN: float16, bfloat16 or float32.
        zeros_GN: uint8, of int4; None: 8 in int4, else 0.
        bias_N: in the model's dtype.
    """

    kind: Kind
    codes: torch.Tensor
    scales_GN: torch.Tensor
    zeros_GN: torch.Tensor | None = None
    bias_N: torch.Tensor | None = None

    @property
    def num_outputs(self) -> int:
        return self.scales_GN.shape[1]

    @property
    def num_inputs(self) -> int:
        return len(self.codes) * SLAB if self.kind == "int4" else self.codes.shape[1]

    @property
    def group_size(self) -> int:
        return self.num_inputs // len(self.scales_GN)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def rows(self, rows: slice) -> "GroupedWeight":
        """Some of the outputs, without bias."""
        zeros_GN = None if self.zeros_GN is None else self.zeros_GN[:, rows]
        codes = self.codes[:, rows] if self.kind == "int4" else self.codes[rows]
        return GroupedWeight(kind=self.kind, codes=codes, scales_GN=self.scales_GN[:, rows], zeros_GN=zeros_GN)

    def dequantized(self) -> torch.Tensor:
        """float32 [N, K]."""
        if self.kind == "int4":
            halves = torch.stack((self.codes & 15, self.codes >> 4), dim=2)  # [K / 32, N, 2, 16]
            numbers = halves.permute(1, 0, 2, 3).flatten(1).float()
        else:
            numbers = self.codes.float()
        numbers = numbers.unflatten(1, (len(self.scales_GN), -1))
        if self.zeros_GN is not None:
            numbers = numbers - self.zeros_GN.T.float()[..., None]
        elif self.kind == "int4":
            numbers = numbers - SYMMETRIC_ZERO
        return (numbers * self.scales_GN.T.float()[..., None]).flatten(1)


def takes(matrix: QuantizedMatrix) -> bool:
    """Whether the kernels have a form for these numbers."""
    has_codes_as_zeros = matrix.zeros is None or matrix.zeros.dtype == torch.uint8
    return matrix.group_size % SLAB == 0 and has_codes_as_zeros


def grouped(matrices: Sequence[QuantizedMatrix], bias_N: torch.Tensor | None = None) -> GroupedWeight:
    """Matrices of one kind that `takes` accepts, and of equally many inputs, below each other; the same numbers."""
    kind = matrices[0].kind
    group = next(size for size in _KERNEL_GROUPS if all(matrix.group_size % size == 0 for matrix in matrices))

    def by_group(numbers_NG: torch.Tensor, matrix: QuantizedMatrix) -> torch.Tensor:
        return numbers_NG.repeat_interleave(matrix.group_size // group, dim=1).T

    dtypes = {matrix.scales.dtype for matrix in matrices}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    scales_GN = torch.cat([by_group(matrix.scales.to(dtype), matrix) for matrix in matrices], dim=1)
    zeros_GN = None
    if any(matrix.zeros is not None and bool((matrix.zeros != SYMMETRIC_ZERO).any()) for matrix in matrices):
        zeros = [matrix.zeros for matrix in matrices if matrix.zeros is not None]  # all: int4 always has them
        zeros_GN = torch.cat([by_group(one, matrix) for one, matrix in zip(zeros, matrices, strict=True)], dim=1)
    if kind == "int4":
        codes = torch.cat([_slabs(matrix) for matrix in matrices], dim=1)
    else:
        codes = torch.cat([matrix.codes for matrix in matrices])
    return GroupedWeight(kind=kind, codes=codes, scales_GN=scales_GN, zeros_GN=zeros_GN, bias_N=bias_N)


def _slabs(matrix: QuantizedMatrix) -> torch.Tensor:
    """uint8 [K / 32, N, 16] of int4."""
    halves = matrix.unpacked_codes().unflatten(1, (-1, 2, SLAB // 2))  # [N, K / 32, 2, 16]
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).transpose(0, 1).contiguous()
