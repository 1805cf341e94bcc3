"""GPTQ folders: integers of 2, 3, 4 or 8 bits with scales and zero points, in the order of inputs or in another.

MODULE.qweight is int32 [K · bits / 32, N], the codes of a column one after the other; MODULE.qzeros int32
[G, N · bits / 32], those of a row; MODULE.scales [G, N]; MODULE.g_idx int32 [K], the group of each input, which may be
absent where groups are neighbours. A weight is scale · (code - zero). Files of checkpoint_format "gptq" store zero - 1,
those of "gptq_v2" store the zero point.
"""

from collections.abc import Mapping
from typing import Any

import torch

from stellarbyte.checkpoint.quantized.bits import num_words, two_in_a_byte, unpacked
from stellarbyte.checkpoint.quantized.source import (
    FLOATS,
    Entries,
    Parts,
    QuantizedSource,
    SourceMatrix,
    corrupt,
    is_in_order,
    kept,
    read_scales,
    scale_dtype,
)
from stellarbyte.checkpoint.safetensors_file import TensorInfo, read_tensor

_BITS = (2, 3, 4, 8)
_OFFSETS = {"gptq": 1, "gptq_v2": 0}  # of zero points, by checkpoint_format

# N outputs, K inputs, G groups of inputs


def read_gptq(entries: Entries, config: Mapping[str, Any]) -> QuantizedSource:
    """Raises ValueError: `config` names a layout that is not supported."""
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    bits = config.get("bits")
    if layout not in _OFFSETS or config.get("is_marlin_format"):
        raise ValueError(f"checkpoint_format {layout!r} is not supported, only {' and '.join(_OFFSETS)}")
    if bits not in _BITS:
        raise ValueError(f"{bits!r} bits are not supported, only {', '.join(map(str, _BITS))}")
    modules = {
        f"{module}.weight": _Module(entries, module, bits, _OFFSETS[layout]) for module in entries.modules(".qweight")
    }
    matrices = {name: module.matrix() for name, module in modules.items()}
    order = "" if all(module.is_in_order() for module in modules.values()) else ", act-order"
    return QuantizedSource(format=f"GPTQ, {bits} bits{order}", matrices=matrices, plain=entries.plain())


class _Module:
    """The tensors of one linear, checked; the small ones are read."""

    def __init__(self, entries: Entries, module: str, bits: int, offset: int) -> None:
        self._name, self._of_zeros, self._of_scales = f"{module}.qweight", f"{module}.qzeros", f"{module}.scales"
        of_groups = f"{module}.g_idx"
        self._bits, self._offset = bits, offset
        self._weight, self._scales = entries.take(self._name, ["I32"]), entries.take(self._of_scales, FLOATS)
        shapes = self._weight.shape, self._scales.shape
        if len(shapes[0]) != 2 or len(shapes[1]) != 2:
            raise corrupt(self._weight, self._name, f"and its scales are {shapes[0]} and {shapes[1]}, not matrices")
        (num_rows, num_outputs), self._num_groups = shapes[0], shapes[1][0]
        num_inputs = num_rows * 32 // bits
        entries.take(self._of_scales, FLOATS, (self._num_groups, num_outputs))
        self._zeros = entries.take(self._of_zeros, ["I32"], (self._num_groups, num_words(num_outputs, bits)))
        if not self._num_groups:
            raise corrupt(self._scales, self._of_scales, "holds no groups")
        self._shape = (num_outputs, num_inputs)
        self._groups: tuple[str, TensorInfo] | None = None
        if entries.has(of_groups):
            self._groups = of_groups, entries.take(of_groups, ["I32", "I64"], (num_inputs,))
        elif num_inputs % self._num_groups:
            raise corrupt(self._scales, self._of_scales, f"holds {self._num_groups} groups for {num_inputs} inputs")

    def matrix(self) -> SourceMatrix:
        parts = self._parts() if self.is_in_order() else None
        if parts is not None:
            return kept(self._shape, parts)
        return SourceMatrix(shape=self._shape, dequantized=self._dequantized)

    def is_in_order(self) -> bool:
        return is_in_order(self._group_of_inputs(), self._num_groups)

    def _parts(self) -> Parts | None:
        is_bytes = self._bits == 8
        if is_bytes and not (self._zero_points() == 128).all():  # int8 has none
            return None
        if not is_bytes and self._shape[1] % 2:
            return None
        return Parts(
            kind="int8" if is_bytes else "int4",
            num_groups=self._num_groups,
            scale_dtype=scale_dtype(self._scales),
            codes=self._signed_bytes if is_bytes else lambda: two_in_a_byte(self._codes()),
            scales=self._scales_by_output,
            zeros=None if is_bytes else self._zero_points,
        )

    def _codes(self) -> torch.Tensor:
        """uint8 [N, K]."""
        return unpacked(read_tensor(self._name, self._weight).T, self._bits, self._shape[1])

    def _signed_bytes(self) -> torch.Tensor:
        return (self._codes().short() - 128).to(torch.int8)

    def _scales_by_output(self) -> torch.Tensor:
        """[N, G]"""
        return read_scales(self._of_scales, self._scales).T.contiguous()

    def _zero_points(self) -> torch.Tensor:
        """uint8 [N, G]"""
        zeros = unpacked(read_tensor(self._of_zeros, self._zeros), self._bits, self._shape[0])
        if self._offset and (zeros == 2**self._bits - 1).any():
            raise corrupt(
                self._zeros,
                self._of_zeros,
                f"holds {2**self._bits - 1}, which programs read as zero points of 0 or of {2**self._bits}: convert it "
                "to checkpoint_format gptq_v2",
            )
        return (zeros + self._offset).T.contiguous()

    def _group_of_inputs(self) -> torch.Tensor:
        """int64 [K]"""
        num_inputs = self._shape[1]
        if self._groups is None:
            return torch.arange(num_inputs) // (num_inputs // self._num_groups)
        name, info = self._groups
        groups = read_tensor(name, info).long()
        if len(groups) and not (0 <= int(groups.min()) and int(groups.max()) < self._num_groups):
            raise corrupt(info, name, f"names groups other than 0 to {self._num_groups - 1}")
        return groups

    def _dequantized(self) -> torch.Tensor:
        groups = self._group_of_inputs()
        zeros, scales = self._zero_points().float()[:, groups], self._scales_by_output().float()[:, groups]
        return (self._codes().float() - zeros) * scales
