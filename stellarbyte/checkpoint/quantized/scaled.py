"""Weights of 8 bits under their own names, with scales beside them: int8 and fp8 of several programs.

MODULE.weight is int8 or float8_e4m3fn [N, K]; a weight is scale · code. One scale is for the whole matrix ([] or [1]),
for an output ([N] or [N, 1]), for a group of inputs of an output ([N, G]), or for a block of [rows, columns]
([⌈N / rows⌉, ⌈K / columns⌉], as DeepSeek and Qwen store them).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

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

Block = tuple[int, int]

_CODES = ("I8", "F8_E4M3")
_FP8_SCALES = (".weight_scale_inv", ".weight_scale")  # the former multiplies, in spite of its name
ACTIVATION_ENDINGS = (
    *(".input_scale", ".activation_scale", ".input_zero_point", ".input_global_scale"),
    *(".output_scale", ".output_zero_point"),
)
CACHE_ENDINGS = (".k_scale", ".v_scale", ".q_scale")
ACTIVATIONS_NOTE = "activations are not quantized, only weights"
CACHE_NOTE = "the scales of a quantized KV cache are not used"

# N outputs, K inputs, G groups of inputs


def read_fp8(entries: Entries, config: Mapping[str, Any]) -> QuantizedSource:
    """FineGrained FP8 (DeepSeek, Qwen) and FP8 with one scale a matrix.

    Raises:
        ValueError: `config` names a layout that is not supported.
    """
    if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise ValueError(f"fmt {config['fmt']!r} is not supported, only 'e4m3'")
    if config.get("expert_dtype", "fp8") != "fp8":
        raise ValueError(f"expert_dtype {config['expert_dtype']!r} is not supported, only 'fp8'")
    blocks = [] if config.get("weight_block_size") is None else [block_size(config["weight_block_size"])]
    notes = ignored(entries)
    matrices = {
        f"{module}.weight": scaled_matrix(entries, module, ending, blocks)
        for ending in _FP8_SCALES
        for module in entries.modules(ending)
    }
    name = "".join(f", blocks of {rows} × {columns}" for rows, columns in blocks)
    return QuantizedSource(
        format=f"FP8{name}", matrices=matrices, plain=entries.plain(), notes=(ACTIVATIONS_NOTE, *notes)
    )


def ignored(entries: Entries) -> tuple[str, ...]:
    """Leave out the scales of activations and of the KV cache; returns a note for the latter."""
    entries.ignore(ACTIVATION_ENDINGS)
    return (CACHE_NOTE,) if entries.ignore(CACHE_ENDINGS) else ()


def block_size(value: object) -> Block:
    """Raises ValueError."""
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise ValueError(f"the block size {value!r} is not [rows, columns]")
    return value[0], value[1]


def scaled_matrix(
    entries: Entries, module: str, scale_ending: str, blocks: Iterable[Block], *, zeros_ending: str | None = None
) -> SourceMatrix:
    """The weight of a module.

    Args:
        blocks: the sizes that scales may be for.
        zeros_ending: of zero points of the scales' shape, which some releases store as zeros; None: there are none.
    """
    name, of_scales = f"{module}.weight", f"{module}{scale_ending}"
    weight = entries.take(name, _CODES)
    scales = entries.take(of_scales, [*FLOATS, "F8_E8M0"])
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise corrupt(weight, name, f"is {list(weight.shape)}, not a matrix")
    shape = (weight.shape[0], weight.shape[1])
    block = _block(scales, of_scales, shape, blocks)

    def read_codes() -> torch.Tensor:
        codes = read_tensor(name, weight)
        if weight.dtype == "F8_E4M3" and codes.float().isnan().any():
            raise corrupt(weight, name, "holds NaN")
        return codes

    def by_output(numbers: torch.Tensor) -> torch.Tensor:
        """[N, G] of scales or zero points."""
        rows, columns = block
        grid = numbers.reshape(-(-shape[0] // rows), -(-shape[1] // columns))
        return grid.repeat_interleave(rows, dim=0)[: shape[0]]

    def read_scales_by_output() -> torch.Tensor:
        return by_output(read_scales(of_scales, scales)).contiguous()

    def read_dequantized() -> torch.Tensor:
        """As `Parts.dequantized`, also where the last block is cut off, or zero points are there."""
        numbers = read_codes().float()
        if zeros_info is not None:
            zeros = by_output(read_tensor(f"{module}{zeros_ending}", zeros_info).float())
            numbers = numbers - zeros.repeat_interleave(block[1], dim=1)[:, : shape[1]]
        return numbers * read_scales_by_output().float().repeat_interleave(block[1], dim=1)[:, : shape[1]]

    zeros_info = None
    if zeros_ending is not None:
        of_zeros = f"{module}{zeros_ending}"
        stored = entries.take(of_zeros, ["I8", "I32", "F8_E4M3"], scales.shape)
        zeros_info = stored if read_tensor(of_zeros, stored).float().any() else None
    if zeros_info is not None or shape[1] % block[1]:
        return SourceMatrix(shape=shape, dequantized=read_dequantized)
    return kept(
        shape,
        Parts(
            kind="fp8" if weight.dtype == "F8_E4M3" else "int8",
            num_groups=shape[1] // block[1],
            scale_dtype=scale_dtype(scales),
            codes=read_codes,
            scales=read_scales_by_output,
        ),
    )


def _block(info: TensorInfo, name: str, shape: tuple[int, int], blocks: Iterable[Block]) -> Block:
    """The rows and columns that share a scale, from the shape of the scales."""
    num_outputs, num_inputs = shape
    for rows, columns in blocks:
        if info.shape == (-(-num_outputs // rows), -(-num_inputs // columns)):
            return rows, columns
    if info.shape in ((), (1,), (1, 1)):
        return num_outputs, num_inputs
    if info.shape in ((num_outputs,), (num_outputs, 1)):
        return 1, num_inputs
    if len(info.shape) == 2 and info.shape[0] == num_outputs and info.shape[1] and num_inputs % info.shape[1] == 0:
        return 1, num_inputs // info.shape[1]
    raise corrupt(info, name, f"of {list(info.shape)} does not fit a weight of {list(shape)}")
