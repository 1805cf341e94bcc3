"""The numbers that a quantized matrix can hold, and rounding to the nearest of them.

A group of neighbouring inputs shares a scale, and in int4 a zero point: code 0..15 stands for scale · (code - zero).
Zero points are codes, so that 0 is kept exactly, or real numbers, so that a group's range is kept exactly.
int8 has codes of -127 to 127, fp8 (e4m3) numbers up to 448. Groups are those of the CPU kernels, so a checkpoint
serves with the numbers that were fitted here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

import torch

from stellarbyte.checkpoint.quantized.matrix import Kind, QuantizedMatrix
from stellarbyte.compress.errors import CompressError

# N outputs, K inputs, G groups of S inputs

GROUPS: Mapping[Kind, int] = {"int4": 32, "int8": 64, "fp8": 64}  # the groups of the CPU kernels
ZeroPoints = Literal["integer", "real", "symmetric"]
MOST_STEPS = 1024  # between 0 and a group's numbers, where zero points are real: they have 16 bits
_LARGEST: Mapping[Kind, float] = {"int4": 15.0, "int8": 127.0, "fp8": torch.finfo(torch.float8_e4m3fn).max}
_SHRINKS = tuple(1.04 - 0.02 * step for step in range(15))  # shares of a group's range that `fit_clipped` tries
_SHIFTS = (-1, 0, 1)  # of zero points that `fit_clipped` tries


class Levels(NamedTuple):
    """What the groups of a matrix share, in float32: [..., G] each; `zeros` are 0 where the kind has none."""

    scales: torch.Tensor
    zeros: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Attributes: scale_dtype: in which scales are stored; codes are fitted to scales of this dtype; zero_points: those
    of int4 are codes, float16 numbers, or always 8."""

    kind: Kind
    scale_dtype: torch.dtype = torch.float16
    zero_points: ZeroPoints = "integer"

    @property
    def group_size(self) -> int:
        return GROUPS[self.kind]

    def check(self, name: str, num_inputs: int) -> None:
        """CompressError unless a matrix of so many inputs consists of whole groups."""
        if num_inputs % self.group_size:
            raise CompressError(
                f"{name} has {num_inputs} inputs; {self.kind} needs a multiple of {self.group_size}, its group."
            )

    def groups(self, weight: torch.Tensor) -> torch.Tensor:
        """[..., K] → [..., G, S]"""
        return weight.unflatten(-1, (-1, self.group_size))

    def fit(self, weight: torch.Tensor, shrink: float | torch.Tensor = 1.0) -> Levels:
        """Levels [..., G] that span each group of [..., K], or a share of its range.

        Raises:
            CompressError: a scale is not finite: the weights are not, or they are too large for `scale_dtype`.
        """
        parts = self.groups(weight)
        if self.kind == "int4" and self.zero_points == "symmetric":
            scales = self.stored_scales(parts.abs().amax(-1) * shrink / 7)
            return Levels(scales, torch.full_like(scales, 8))
        if self.kind == "int4" and self.zero_points == "real":
            low, high = parts.amin(-1) * shrink, parts.amax(-1) * shrink
            steps = torch.maximum((high - low) / _LARGEST["int4"], parts.abs().amax(-1) / MOST_STEPS)
            scales = self.stored_scales(steps)
            return Levels(scales, self.stored_zeros(-low / scales))
        if self.kind == "int4":  # 0 is in the range, so that it has a code
            low, high = (parts.amin(-1).clamp(max=0) * shrink, parts.amax(-1).clamp(min=0) * shrink)
            scales = self.stored_scales((high - low) / _LARGEST["int4"])
            return Levels(scales, (-low / scales).round().clamp(0, 15))
        scales = self.stored_scales(parts.abs().amax(-1) * shrink / _LARGEST[self.kind])
        return Levels(scales, torch.zeros_like(scales))

    def stored_scales(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales as `scale_dtype` keeps them, in float32: positive.

        Raises:
            CompressError: one is not finite.
        """
        smallest = torch.finfo(self.scale_dtype).smallest_normal
        stored = scales.clamp(min=smallest).to(self.scale_dtype).float()
        if not stored.isfinite().all():
            raise CompressError(f"weights are not finite, or too large for scales of {self.scale_dtype}.")
        return stored

    def stored_zeros(self, zeros: torch.Tensor) -> torch.Tensor:
        """Real zero points as they are kept, in float32."""
        return zeros.clamp(-2 * MOST_STEPS, 2 * MOST_STEPS).half().float()

    def fit_clipped(self, weight: torch.Tensor, gram_KK: torch.Tensor) -> Levels:
        """As `fit` for [N, K], with the share of each group's range, and the zero point beside the nearest, that change
        the group's own product least.

        The change is ‖(w - ŵ) X‖² over the group's inputs alone (AWQ's search for clipping).
        """
        size = self.group_size
        parts = self.groups(weight)
        starts = range(0, weight.shape[-1], size)
        blocks_GSS = torch.stack([gram_KK[i : i + size, i : i + size] for i in starts]).float()
        best, least_NG = self.fit(weight), torch.full(parts.shape[:-1], torch.inf)
        shifts = _SHIFTS if self.kind == "int4" and self.zero_points == "integer" else (0,)
        for shrink, shift in product(_SHRINKS, shifts):
            levels = self.fit(weight, shrink)
            if shift:
                levels = levels._replace(zeros=(levels.zeros + shift).clamp(0, 15))
            gap_NGS = parts - self.groups(self.round(weight, levels))
            error_NG = (torch.einsum("ngs,gst->ngt", gap_NGS, blocks_GSS) * gap_NGS).sum(-1)
            is_better = error_NG < least_NG
            least_NG = torch.where(is_better, error_NG, least_NG)
            best = Levels(*(torch.where(is_better, new, old) for new, old in zip(levels, best, strict=True)))
        return best

    def codes(self, weight: torch.Tensor, levels: Levels) -> torch.Tensor:
        """float32 codes [..., K] of the nearest numbers."""
        return self.codes_at(self.groups(weight), levels.scales[..., None], levels.zeros[..., None]).flatten(-2)

    def codes_at(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """As `codes`, for weights whose scale and zero point are given in a shape that fits."""
        if self.kind == "int4":
            return (weight / scale + zero).round().clamp(0, 15)
        limit = _LARGEST[self.kind]
        steps = (weight / scale).clamp(-limit, limit)
        return steps.round() if self.kind == "int8" else steps.to(torch.float8_e4m3fn).float()

    def numbers(self, codes: torch.Tensor, levels: Levels) -> torch.Tensor:
        """float32 [..., K] that codes stand for."""
        return ((self.groups(codes) - levels.zeros[..., None]) * levels.scales[..., None]).flatten(-2)

    def round(self, weight: torch.Tensor, levels: Levels) -> torch.Tensor:
        """The nearest numbers, float32 [..., K]."""
        return self.numbers(self.codes(weight, levels), levels)

    def stored(self, codes: torch.Tensor, levels: Levels) -> QuantizedMatrix:
        """The matrix as checkpoints keep it."""
        scales = levels.scales.to(self.scale_dtype)
        if self.kind == "int4":
            packed = codes.to(torch.uint8)
            packed = packed[..., 0::2] | (packed[..., 1::2] << 4)
            zeros = levels.zeros.to(torch.float16 if self.zero_points == "real" else torch.uint8)
            return QuantizedMatrix(kind="int4", codes=packed, scales=scales, zeros=zeros)
        dtype = torch.int8 if self.kind == "int8" else torch.float8_e4m3fn
        return QuantizedMatrix(kind=self.kind, codes=codes.to(dtype), scales=scales)
