"""Folders of bitsandbytes: 4 bits (nf4, fp4; also with quantized scales), and LLM.int8.

4 bits: MODULE.weight is uint8 [⌈N · K / 2⌉, 1], two codes in a byte, the first in the high bits, for blocks of the
flattened matrix; quant_map [16] holds the number of each code, absmax the factor of each block. With double
quantization absmax is uint8, and factor i is nested_quant_map[absmax[i]] · nested_absmax[i // nested_blocksize] +
nested_offset. quant_state.bitsandbytes__KIND holds the rest as JSON, in bytes.

LLM.int8: MODULE.weight is int8 [N, K], a weight is SCB[output] · code / 127.
"""

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from stellarbyte.checkpoint.quantized.source import Entries, Parts, QuantizedSource, SourceMatrix, corrupt, kept
from stellarbyte.checkpoint.safetensors_file import TensorInfo, read_tensor

_STATE = ".weight.quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_LARGEST_BLOCK = 2**20
_LARGEST_STATE = 2**16

# N outputs, K inputs, B blocks


def read_bitsandbytes(entries: Entries, _config: Mapping[str, Any]) -> QuantizedSource:
    """Raises ValueError: the folder's layout is not supported."""
    names = sorted(
        (name for name in entries.tensors if _STATE in name),
    )
    if unknown := [name for name in names if not name.endswith(_KINDS)]:
        raise ValueError(f"{unknown[0]} is not supported, only {' and '.join(_KINDS)}")
    matrices = {f"{name.partition(_STATE)[0]}.weight": _four_bits(entries, name) for name in names}
    kinds = sorted({name.partition(_STATE)[2] for name in names})
    int8 = entries.modules(".SCB")
    matrices |= {f"{module}.weight": _int8(entries, module) for module in int8}
    entries.ignore((".weight_format",))
    format = f"bitsandbytes, {', '.join([*kinds, *(['int8'] if int8 else [])])}"
    return QuantizedSource(format=format, matrices=matrices, plain=entries.plain())


def _four_bits(entries: Entries, state_name: str) -> SourceMatrix:
    name = state_name.partition(_STATE)[0] + ".weight"
    state = _read_state(state_name, entries.take(state_name, ["U8"]))
    shape, block = state["shape"], state["blocksize"]
    count = prod(shape)
    num_bytes, num_blocks = -(-count // 2), -(-count // block)
    weight = entries.take(name, ["U8"], (num_bytes, 1), (1, num_bytes), (num_bytes,))
    numbers = entries.take(f"{name}.quant_map", ["F32"], (16,))
    is_nested = "nested_blocksize" in state
    factors = entries.take(f"{name}.absmax", ["U8" if is_nested else "F32"], (num_blocks,))
    nested: dict[str, TensorInfo] = {}
    if is_nested:
        of_blocks = (-(-num_blocks // state["nested_blocksize"]),)
        nested[f"{name}.nested_absmax"] = entries.take(f"{name}.nested_absmax", ["F32"], of_blocks)
        nested[f"{name}.nested_quant_map"] = entries.take(f"{name}.nested_quant_map", ["F32"], (256,))

    def read_factors() -> torch.Tensor:
        """float32 [B]"""
        stored = read_tensor(f"{name}.absmax", factors)
        if not nested:
            return stored
        outer, table = (read_tensor(key, info) for key, info in nested.items())
        of_blocks = outer.repeat_interleave(state["nested_blocksize"])[:num_blocks]
        return table[stored.int()] * of_blocks + state["nested_offset"]

    def read_dequantized() -> torch.Tensor:
        pairs = read_tensor(name, weight).flatten()
        codes = torch.stack((pairs >> 4, pairs & 15), dim=1).flatten()[:count]
        values = read_tensor(f"{name}.quant_map", numbers)[codes.int()]
        matrix = values * read_factors().repeat_interleave(block)[:count]
        if not matrix.isfinite().all():
            raise corrupt(weight, name, "decodes to NaN or infinity")
        return matrix.view(shape)

    return SourceMatrix(shape=shape, dequantized=read_dequantized)


def _read_state(name: str, info: TensorInfo) -> dict[str, Any]:
    """The JSON in a tensor of bytes; `shape` is a pair, sizes are positive."""
    if len(info.shape) != 1 or info.shape[0] > _LARGEST_STATE:
        raise corrupt(info, name, f"is {list(info.shape)}, not a list of bytes")
    try:
        state = json.loads(bytes(read_tensor(name, info).tolist()))
        shape = [int(size) for size in state["shape"]]
        if len(shape) != 2 or not all(0 < size < 2**31 for size in shape):
            raise ValueError(f"its shape is {shape}")
        found: dict[str, Any] = {"shape": (shape[0], shape[1]), "blocksize": _block_size(state["blocksize"])}
        if "nested_blocksize" in state:
            found["nested_blocksize"] = _block_size(state["nested_blocksize"])
            found["nested_offset"] = float(state["nested_offset"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise corrupt(info, name, "is not the JSON that bitsandbytes writes") from error
    return found


def _block_size(value: object) -> int:
    if type(value) is not int or not 0 < value <= _LARGEST_BLOCK:
        raise ValueError(f"a block size of {value!r}")
    return value


def _int8(entries: Entries, module: str) -> SourceMatrix:
    name, of_scales = f"{module}.weight", f"{module}.SCB"
    weight = entries.take(name, ["I8"])
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise corrupt(weight, name, f"is {list(weight.shape)}, not a matrix")
    scales = entries.take(of_scales, ["F32"], weight.shape[:1])

    def read_scales() -> torch.Tensor:
        found = read_tensor(of_scales, scales)
        if not found.isfinite().all():
            raise corrupt(scales, of_scales, "holds NaN or infinity")
        return (found / 127)[:, None]

    return kept(
        (weight.shape[0], weight.shape[1]),
        Parts(
            kind="int8",
            num_groups=1,
            scale_dtype=torch.float32,
            codes=lambda: read_tensor(name, weight),
            scales=read_scales,
        ),
    )
