"""The plan of a conversion, complete before anything is written."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from stellarbyte.checkpoint.quantized.origin import Origin


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


Place = tuple[int | slice, ...]  # in a larger tensor, as torch indexes it


def assembled(shape: tuple[int, ...], pieces: Sequence[tuple[Place, PlannedTensor]]) -> PlannedTensor:
    """The tensor that the pieces fill, which have one dtype. Reading it holds one piece beside the whole."""
    dtype = pieces[0][1].dtype

    def read() -> torch.Tensor:
        whole = torch.empty(shape, dtype=dtype)
        for place, piece in pieces:
            whole[place].copy_(piece.read())
        return whole

    return PlannedTensor(dtype=dtype, shape=shape, read=read)


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """The complete result of converting a source. Planning reads headers and metadata only.

    Attributes:
        config: of the target; another program's where the target is a folder for it.
        generation: the contents of generation_config.json.
        tensors: by the target's names.
        write_tokenizer: writes the tokenizer's files into a given folder.
        origin: how the source's weights were quantized; None: they were not, or are not read from a folder.
    """

    source: Path
    config: PreTrainedConfig
    generation: dict[str, Any]
    tensors: Mapping[str, PlannedTensor]
    write_tokenizer: Callable[[Path], None]
    origin: Origin | None = None
