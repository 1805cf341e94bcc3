"""Quantized matrices in the layout of the kernels for groups of inputs."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stellarbyte.checkpoint.quantized.matrix import Kind, QuantizedMatrix

# N outputs, K inputs, G groups of K / G neighbouring inputs

SLAB = 64  # inputs of int4 whose codes are adjacent: 32 bytes, as much as memory transfers at once
_KERNEL_GROUPS = (128, 64, 32)  # inputs that a step of the kernels multiplies; larger groups are several of these


@dataclass(frozen=True, kw_only=True)
class GroupedWeight:
    """A matrix [N, K] of numbers scale · (code - zero).

    Attributes:
        group_size: inputs that share a scale.
        codes: int4: int16 [K / 64, N, 16], where number i of a slab holds the inputs i (lowest bits), 16 + i, 32 + i
            and 48 + i, so that each four bits of several numbers are a matrix [N, 16]; the last slab may be half
            empty. int8 and fp8 (e4m3): [N, K].
        groups_GN: int8 and fp8: scales in float16, bfloat16 or float32. int4: words, with the bits of a scale below and
            of a zero point above: int32 with scales of 16 bits, int64 with float32.
        scale_dtype: of the scales.
        has_real_zeros: zero points are float16 numbers; else integers from 0 to 16.
        bias_N: in the model's dtype.
    """

    kind: Kind
    group_size: int
    codes: torch.Tensor
    groups_GN: torch.Tensor
    scale_dtype: torch.dtype
    has_real_zeros: bool = False
    bias_N: torch.Tensor | None = None

    @property
    def num_outputs(self) -> int:
        return self.groups_GN.shape[1]

    @property
    def num_inputs(self) -> int:
        return len(self.groups_GN) * self.group_size

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def rows(self, rows: slice) -> "GroupedWeight":
        """Some of the outputs, without bias."""
        codes = self.codes[:, rows] if self.kind == "int4" else self.codes[rows]
        return dataclasses.replace(self, codes=codes, groups_GN=self.groups_GN[:, rows], bias_N=None)

    def dequantized(self) -> torch.Tensor:
        """float32 [N, K]."""
        if self.kind != "int4":
            return self._scaled(self.codes.float(), self.groups_GN)
        quarters = torch.stack([self.codes >> 4 * place & 15 for place in range(4)], dim=2)  # [K / 64, N, 4, 16]
        numbers_NK = quarters.permute(1, 0, 2, 3).flatten(1)[:, : self.num_inputs].float()
        bits = _bits(self.scale_dtype)
        scales_GN = self.groups_GN.to(_WORD_OF[bits]).view(self.scale_dtype)
        zeros_GN = self.groups_GN >> bits
        if self.has_real_zeros:
            zeros_GN = zeros_GN.to(torch.int16).view(torch.float16).float()
        return self._scaled(numbers_NK - zeros_GN.T.repeat_interleave(self.group_size, dim=1), scales_GN)

    def _scaled(self, numbers_NK: torch.Tensor, scales_GN: torch.Tensor) -> torch.Tensor:
        return numbers_NK * scales_GN.T.float().repeat_interleave(self.group_size, dim=1)


def takes(matrix: QuantizedMatrix) -> bool:
    """Whether the kernels have a form for these numbers."""
    return matrix.group_size % _KERNEL_GROUPS[-1] == 0


def grouped(matrices: Sequence[QuantizedMatrix], bias_N: torch.Tensor | None = None) -> GroupedWeight:
    """Matrices of one kind that `takes` accepts, and of equally many inputs, below each other; the same numbers."""
    kind = matrices[0].kind
    group = next(size for size in _KERNEL_GROUPS if all(matrix.group_size % size == 0 for matrix in matrices))

    def by_group(numbers_NG: torch.Tensor, matrix: QuantizedMatrix) -> torch.Tensor:
        return numbers_NG.repeat_interleave(matrix.group_size // group, dim=1).T

    dtypes = {matrix.scales.dtype for matrix in matrices}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    groups_GN = torch.cat([by_group(matrix.scales.to(dtype), matrix) for matrix in matrices], dim=1)
    has_real_zeros = False
    if kind == "int4":
        zeros = [matrix.zeros for matrix in matrices if matrix.zeros is not None]  # all: int4 always has them
        has_real_zeros = any(one.is_floating_point() for one in zeros)
        zeros = [one.half() if has_real_zeros else one for one in zeros]
        zeros_GN = torch.cat([by_group(one, matrix) for one, matrix in zip(zeros, matrices, strict=True)], dim=1)
        groups_GN = packed_groups(groups_GN, zeros_GN)
        codes = torch.cat([_slabs(matrix) for matrix in matrices], dim=1)
    else:
        codes = torch.cat([matrix.codes for matrix in matrices])
    return GroupedWeight(
        kind=kind, group_size=group, codes=codes, groups_GN=groups_GN.contiguous(), scale_dtype=dtype,
        has_real_zeros=has_real_zeros, bias_N=bias_N,
    )  # fmt: skip


def packed_groups(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """The words of int4: scales in the form of their dtype, and above them integers from 0 to 16 or float16 numbers."""
    bits = _bits(scales.dtype)
    word = torch.int32 if bits == 16 else torch.int64
    if zeros.is_floating_point():
        zeros = zeros.contiguous().view(torch.int16)
    return scales.contiguous().view(_WORD_OF[bits]).to(word) & (1 << bits) - 1 | zeros.to(word) << bits


_WORD_OF = {16: torch.int16, 32: torch.int32}


def _bits(dtype: torch.dtype) -> int:
    return 8 * dtype.itemsize


def _slabs(matrix: QuantizedMatrix) -> torch.Tensor:
    """int16 [K / 64, N, 16] of int4."""
    codes_NK = matrix.unpacked_codes()
    codes_NK = torch.nn.functional.pad(codes_NK, (0, -codes_NK.shape[1] % SLAB))
    quarters = codes_NK.to(torch.int16).unflatten(1, (-1, 4, SLAB // 4))  # [N, K / 64, 4, 16]
    first, second, third, fourth = quarters.unbind(2)
    return (first | second << 4 | third << 8 | fourth << 12).transpose(0, 1).contiguous()
