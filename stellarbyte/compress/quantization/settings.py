"""What a compression does."""

from dataclasses import dataclass
from typing import Literal

import torch

from stellarbyte.checkpoint.quantized.matrix import Kind
from stellarbyte.compress.errors import CompressError
from stellarbyte.compress.quantization.grid import ZeroPoints

Method = Literal["round", "gptq", "awq", "smoothquant"]


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How matrices are rounded.

    Attributes:
        kind: of the matrices of layers.
        head: whether the head becomes int8 (fp8 with fp8). A tied head then is stored apart from the embedding.
        scale_dtype: of the stored scales.
        strength: SmoothQuant's α, 0 to 1: how much of the inputs' range moves into weights; None: 0.5.
        keeps_zeros: weights that are 0 stay 0, as after pruning.
        zero_points: of int4: "integer", which keeps 0 exactly, "real", whose rounding errors are smaller, or
            "symmetric", as other programs read it best.
    """

    method: Method
    kind: Kind = "int4"
    head: bool = True
    scale_dtype: torch.dtype = torch.float16
    strength: float | None = None
    keeps_zeros: bool = False
    zero_points: ZeroPoints = "integer"

    def __post_init__(self) -> None:
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise CompressError(f"strength ({self.strength}) must be from 0 to 1.")
        if self.strength is not None and self.method != "smoothquant":
            raise CompressError(f"strength is a setting of smoothquant, not of {self.method}.")

        if self.zero_points == "real" and self.kind != "int4":
            raise CompressError(f"zero points (real) are a setting of int4, not of {self.kind}.")
        if self.zero_points == "real" and self.keeps_zeros:
            raise CompressError("zero points (real) cannot keep the zeros of pruned weights; leave them integer.")

    @property
    def head_kind(self) -> Kind:
        return "int8" if self.kind == "int4" else self.kind

    @property
    def folds(self) -> bool:
        """Whether factors of inputs are folded into what comes before."""
        return self.method in ("awq", "smoothquant")
