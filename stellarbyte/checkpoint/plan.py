"""The plan of a conversion, complete before anything is written."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stellarbyte.config import ByteModelConfig


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor of the target, not yet read; `read()` returns it on the CPU in this dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def cast(self, dtype: torch.dtype) -> "PlannedTensor":
        if dtype == self.dtype:
            return self
        return replace(self, dtype=dtype, read=lambda: self.read().to(dtype))


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """The complete result of converting a source. Planning reads headers and metadata only.

    Attributes:
        generation: the contents of generation_config.json.
        tensors: by the target's names.
        write_tokenizer: writes the tokenizer's files into a given folder.
    """

    source: Path
    config: ByteModelConfig
    generation: dict[str, Any]
    tensors: Mapping[str, PlannedTensor]
    write_tokenizer: Callable[[Path], None]
