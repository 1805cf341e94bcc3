"""AWQ folders (the "gemm" layout of AutoAWQ): integers of 4 bits with scales and zero points.

MODULE.qweight is int32 [K, N / 8], MODULE.qzeros int32 [G, N / 8] and MODULE.scales [G, N]. The eight codes of a word
are those of columns 0, 2, 4, 6, 1, 3, 5 and 7 of its eight, from the lowest bits on. A weight is scale · (code - zero).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from stellarbyte.checkpoint.quantized.bits import two_in_a_byte, unpacked
from stellarbyte.checkpoint.quantized.source import (
    FLOATS,
    Entries,
    Parts,
    QuantizedSource,
    SourceMatrix,
    corrupt,
    kept,
    read_scales,
    scale_dtype,
)
from stellarbyte.checkpoint.safetensors_file import TensorInfo, read_tensor

_BITS = 4
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the codes of columns 0, 1 … in a word

# N outputs, K inputs, G groups of inputs


def read_awq(entries: Entries, config: Mapping[str, Any]) -> QuantizedSource:
    """Raises ValueError: `config` names a layout that is not supported."""
    layout = str(config.get("version") or config.get("format") or "gemm").lower()
    bits = config.get("bits", config.get("w_bit", _BITS))
    if layout != "gemm":
        raise ValueError(f"the layout {layout!r} is not supported, only 'gemm'")
    if bits != _BITS:
        raise ValueError(f"{bits!r} bits are not supported, only {_BITS}")
    if not config.get("zero_point", True):
        raise ValueError("zero_point false is not supported")
    matrices = {f"{module}.weight": _matrix(entries, module) for module in entries.modules(".qweight")}
    return QuantizedSource(format=f"AWQ, {_BITS} bits", matrices=matrices, plain=entries.plain())


def _matrix(entries: Entries, module: str) -> SourceMatrix:
    name, of_scales, of_zeros = f"{module}.qweight", f"{module}.scales", f"{module}.qzeros"
    weight, scales = entries.take(name, ["I32"]), entries.take(of_scales, FLOATS)
    if len(weight.shape) != 2 or len(scales.shape) != 2:
        raise corrupt(weight, name, f"and its scales are {list(weight.shape)} and {list(scales.shape)}, not matrices")
    num_inputs, num_outputs = weight.shape[0], 8 * weight.shape[1]
    entries.take(of_scales, FLOATS, (scales.shape[0], num_outputs))
    zeros = entries.take(of_zeros, ["I32"], (scales.shape[0], weight.shape[1]))
    num_groups = scales.shape[0]
    if not num_groups or num_inputs % num_groups or num_inputs % 2:
        raise corrupt(scales, of_scales, f"holds {num_groups} groups for {num_inputs} inputs")
    return kept(
        (num_outputs, num_inputs),
        Parts(
            kind="int4",
            num_groups=num_groups,
            scale_dtype=scale_dtype(scales),
            codes=lambda: two_in_a_byte(_columns(name, weight)),
            scales=lambda: read_scales(of_scales, scales).T.contiguous(),
            zeros=partial(_columns, of_zeros, zeros),
        ),
    )


def _columns(name: str, info: TensorInfo) -> torch.Tensor:
    """uint8 [N, R] of words [R, N / 8]."""
    words = read_tensor(name, info)
    codes = unpacked(words, _BITS, 8 * words.shape[1])
    return codes.unflatten(1, (-1, 8))[..., list(_PLACES)].flatten(1).T.contiguous()
