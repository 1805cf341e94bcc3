"""Folders of compressed-tensors (llm-compressor): packed integers, int8 and fp8.

pack-quantized: MODULE.weight_packed is int32 [N, ⌈K · bits / 32⌉], codes of code + 2^(bits - 1) one after the other;
weight_scale [N, G]; weight_shape holds N and K; weight_zero_point int32 [⌈N · bits / 32⌉, G] holds zero points, packed
along N; weight_g_idx [K] holds the group of each input, with act-order. The others are as `scaled` describes them.

The tensors show which modules are quantized, and how: the targets and the ignore list of the config are not needed.
"""

from collections.abc import Mapping
from typing import Any

import torch

from stellarbyte.checkpoint.quantized.bits import num_words, two_in_a_byte, unpacked
from stellarbyte.checkpoint.quantized.scaled import ACTIVATIONS_NOTE, CACHE_NOTE, block_size, ignored, scaled_matrix
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

_PACKED, _INT, _FLOAT, _NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
_FORMATS = (_PACKED, _INT, _FLOAT, _NAIVE)
_MIXED = "mixed-precision"  # each group of the config has a format of its own
_STATUSES = ("compressed", "frozen")
_SCALE, _ZEROS = ".weight_scale", ".weight_zero_point"

# N outputs, K inputs, G groups of inputs


def read_compressed_tensors(entries: Entries, config: Mapping[str, Any]) -> QuantizedSource:
    """Raises ValueError: `config` names a layout that is not supported."""
    groups = _groups(config)
    formats = {str(group.get("format") or config.get("format")) for group in groups}
    if unknown := sorted(formats - set(_FORMATS)):
        raise ValueError(f"the format {unknown[0]!r} is not supported, only {', '.join(_FORMATS)}")
    if config.get("format") not in (*_FORMATS, _MIXED):
        raise ValueError(f"the format {config.get('format')!r} is not supported, only {', '.join(_FORMATS)}")
    if config.get("quantization_status", "compressed") not in _STATUSES:
        raise ValueError(f"quantization_status {config['quantization_status']!r} is not supported, only 'compressed'")
    if config.get("transform_config"):
        raise ValueError("transform_config (rotations of activations) is not supported")
    sparsity = config.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise ValueError(f"the sparsity format {sparsity['format']!r} is not supported, only 'dense'")
    weights = [group["weights"] for group in groups]
    blocks = [block_size(made["block_structure"]) for made in weights if made.get("block_structure") is not None]
    notes = ignored(entries)
    if config.get("kv_cache_scheme") is not None and not notes:
        notes = (CACHE_NOTE,)
    if any(group.get("input_activations") or group.get("output_activations") for group in groups):
        notes = (ACTIVATIONS_NOTE, *notes)
    bits = sorted({made.get("num_bits") for made in weights})
    matrices = {
        f"{module}.weight": _packed_matrix(entries, module, bits) for module in entries.modules(".weight_packed")
    }
    for module in entries.modules(_SCALE):
        if f"{module}.weight" not in matrices:
            zeros = _ZEROS if entries.has(f"{module}{_ZEROS}") else None
            matrices[f"{module}.weight"] = scaled_matrix(entries, module, _SCALE, blocks, zeros_ending=zeros)
    kinds = ", ".join(sorted({f"{made.get('type', 'int')}{made.get('num_bits')}" for made in weights}))
    name = f"compressed-tensors {' and '.join(sorted(formats))}, {kinds}"
    return QuantizedSource(format=name, matrices=matrices, plain=entries.plain(), notes=notes)


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = config.get("config_groups")
    found = list(groups.values()) if isinstance(groups, dict) else []
    if not found or not all(isinstance(group, dict) and isinstance(group.get("weights"), dict) for group in found):
        raise ValueError("its config_groups do not say how weights are quantized")
    return found


def _packed_matrix(entries: Entries, module: str, may_have_bits: list[int]) -> SourceMatrix:
    name, of_scales, of_zeros = f"{module}.weight_packed", f"{module}{_SCALE}", f"{module}{_ZEROS}"
    weight, scales = entries.take(name, ["I32"]), entries.take(of_scales, FLOATS)
    shape = _shape(entries, module)
    num_outputs, num_inputs = shape
    bits = _bits(weight, name, shape, may_have_bits)
    num_groups = scales.shape[1] if len(scales.shape) == 2 else 0
    entries.take(of_scales, FLOATS, (num_outputs, num_groups))
    if not num_groups:
        raise corrupt(scales, of_scales, "holds no groups")
    zeros_info = None
    if entries.has(of_zeros):
        zeros_info = entries.take(of_zeros, ["I32"], (num_words(num_outputs, bits), num_groups))
    groups = _group_of_inputs(entries, module, num_inputs, num_groups)
    middle = 2 ** (bits - 1)

    def read_codes() -> torch.Tensor:
        return unpacked(read_tensor(name, weight), bits, num_inputs)

    def read_zeros() -> torch.Tensor:
        if zeros_info is None:
            return torch.full((num_outputs, num_groups), middle, dtype=torch.uint8)
        return unpacked(read_tensor(of_zeros, zeros_info).T, bits, num_outputs).T.contiguous()

    def read_dequantized() -> torch.Tensor:
        numbers = read_codes().float() - read_zeros().float()[:, groups]
        return numbers * read_scales(of_scales, scales).float()[:, groups]

    def signed_bytes() -> torch.Tensor:
        return (read_codes().short() - middle).to(torch.int8)

    if not is_in_order(groups, num_groups) or (bits <= 4 and num_inputs % 2) or (bits > 4 and zeros_info is not None):
        return SourceMatrix(shape=shape, dequantized=read_dequantized)
    return kept(
        shape,
        Parts(
            kind="int4" if bits <= 4 else "int8",
            num_groups=num_groups,
            scale_dtype=scale_dtype(scales),
            codes=(lambda: two_in_a_byte(read_codes())) if bits <= 4 else signed_bytes,
            scales=lambda: read_scales(of_scales, scales),
            zeros=read_zeros if bits <= 4 else None,
        ),
    )


def _shape(entries: Entries, module: str) -> tuple[int, int]:
    name = f"{module}.weight_shape"
    info = entries.take(name, ["I64", "I32"], (2,))
    num_outputs, num_inputs = read_tensor(name, info).tolist()
    return num_outputs, num_inputs


def _bits(info: TensorInfo, name: str, shape: tuple[int, int], may_have_bits: list[int]) -> int:
    """Those of the config's groups that fit the words of a row. Files in which 3 or 5 bits leave a part of each word
    empty, as earlier releases wrote them, are refused by that."""
    for bits in may_have_bits:
        if 1 <= bits <= 8 and info.shape == (shape[0], num_words(shape[1], bits)):
            return bits
    raise corrupt(info, name, f"of {list(info.shape)} does not fit a weight of {list(shape)}")


def _group_of_inputs(entries: Entries, module: str, num_inputs: int, num_groups: int) -> torch.Tensor:
    """int64 [K]"""
    name = f"{module}.weight_g_idx"
    if not entries.has(name):
        return torch.arange(num_inputs) // -(-num_inputs // num_groups)
    info = entries.take(name, ["I32", "I64"], (num_inputs,))
    groups = read_tensor(name, info).long()
    if groups.min() == -1 == groups.max():  # as it is made, before act-order fills it in
        return torch.arange(num_inputs) // -(-num_inputs // num_groups)
    if groups.min() < 0 or groups.max() >= num_groups:
        raise corrupt(info, name, f"names groups other than 0 to {num_groups - 1}")
    return groups
