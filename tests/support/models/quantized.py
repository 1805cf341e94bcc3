"""Tiny folders of quantized models in the layouts of other programs, and the same models with dequantized weights.

Each packer here is written from the documentation of a layout, bit by bit. Numbers are computed in float64.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.support.models.hugging_face import tiny_llama, tiny_qwen3_moe

# N outputs, K inputs, G groups of inputs

Tensors = dict[str, torch.Tensor]
Packed = tuple[Tensors, np.ndarray]  # tensors by their endings, and the numbers that they stand for [N, K]
Pack = Callable[[np.ndarray, np.random.Generator], Packed]

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "initializer_range": 0.1,
    "attention_bias": True,
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """int32 [R, W] of codes [R, C]: the bits of one code after those of the other, the lowest first."""
    stream = (codes[..., None].astype(np.int64) >> np.arange(bits) & 1).astype(np.uint8).reshape(len(codes), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view("<i4").copy())


def groups_of(weight: np.ndarray, size: int) -> np.ndarray:
    """[N, G, size]"""
    return weight.reshape(len(weight), -1, size)


def asymmetric(weight: np.ndarray, size: int, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, K], scales in float16 [N, G], zero points of 1 to 2^bits - 1 [N, G], and the numbers [N, K]."""
    parts = groups_of(weight, size)
    largest = 2**bits - 1
    low, high = np.minimum(parts.min(-1), -1e-3), np.maximum(parts.max(-1), 1e-3)
    scales = ((high - low) / largest).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales.astype(np.float64)), 1, largest)
    codes = np.clip(np.rint(parts / scales[..., None].astype(np.float64)) + zeros[..., None], 0, largest)
    numbers = (codes - zeros[..., None]) * scales[..., None].astype(np.float64)
    return codes.reshape(weight.shape), scales, zeros, numbers.reshape(weight.shape)


def symmetric(weight: np.ndarray, size: int, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed codes [N, K], scales in bfloat16's precision [N, G], and the numbers [N, K]."""
    parts = groups_of(weight, size)
    half = 2 ** (bits - 1)
    scales = torch.from_numpy(np.abs(parts).max(-1) / (half - 1)).bfloat16().double().numpy()
    codes = np.clip(np.rint(parts / scales[..., None]), -half, half - 1)
    return codes.reshape(weight.shape), scales, (codes * scales[..., None]).reshape(weight.shape)


def awq(size: int) -> Pack:
    def pack(weight: np.ndarray, _rng: np.random.Generator) -> Packed:
        codes, scales, zeros, numbers = asymmetric(weight, size, 4)

        def in_order(columns: np.ndarray) -> torch.Tensor:
            """[R, N] with the columns of each word in AutoAWQ's order, as words."""
            return words(columns.reshape(len(columns), -1, 8)[..., AWQ_ORDER].reshape(columns.shape), 4)

        tensors = {
            ".qweight": in_order(codes.T),
            ".qzeros": in_order(zeros.T),
            ".scales": torch.from_numpy(scales.T.copy()),
        }
        return tensors, numbers

    return pack


def gptq(size: int, bits: int, *, is_v1: bool = True, act_order: bool = False, sym: bool = False) -> Pack:
    def pack(weight: np.ndarray, rng: np.random.Generator) -> Packed:
        order = rng.permutation(weight.shape[1]) if act_order else np.arange(weight.shape[1])
        if sym:
            signed, scales, in_order = symmetric(weight[:, order], size, bits)
            codes, zeros = signed + 2 ** (bits - 1), np.full(scales.shape, 2 ** (bits - 1))
        else:
            codes, scales, zeros, in_order = asymmetric(weight[:, order], size, bits)
        back = np.argsort(order)
        tensors = {
            ".qweight": words(codes[:, back], bits).T.contiguous(),
            ".qzeros": words((zeros - is_v1).T, bits),
            ".scales": torch.from_numpy(scales.T.copy()).to(torch.bfloat16 if sym else torch.float16),
            ".g_idx": torch.from_numpy((np.arange(len(order)) // size)[back].astype(np.int32)),
        }
        return tensors, in_order[:, back]

    return pack


def pack_quantized(size: int, bits: int, *, sym: bool = True, act_order: bool = False) -> Pack:
    """compressed-tensors' format of this name; `size` 0: one scale for each output."""

    def pack(weight: np.ndarray, rng: np.random.Generator) -> Packed:
        order = rng.permutation(weight.shape[1]) if act_order else np.arange(weight.shape[1])
        width = size or weight.shape[1]
        back, tensors = np.argsort(order), {}
        if sym:
            signed, scales, in_order = symmetric(weight[:, order], width, bits)
            codes = signed + 2 ** (bits - 1)
            tensors[".weight_scale"] = torch.from_numpy(scales).bfloat16()
        else:
            codes, scales, zeros, in_order = asymmetric(weight[:, order], width, bits)
            tensors[".weight_scale"] = torch.from_numpy(scales)
            tensors[".weight_zero_point"] = words(zeros.T, bits).T.contiguous()
        tensors[".weight_packed"] = words(codes[:, back], bits)
        tensors[".weight_shape"] = torch.tensor(weight.shape)
        if act_order:
            tensors[".weight_g_idx"] = torch.from_numpy((np.arange(len(order)) // width)[back].astype(np.int32))
        return tensors, in_order[:, back]

    return pack


def int_quantized(*, sym: bool = True) -> Pack:
    """compressed-tensors' W8A8: int8 with a scale for each output; static scales of activations beside it."""

    def pack(weight: np.ndarray, _rng: np.random.Generator) -> Packed:
        if sym:
            codes, scales, numbers = symmetric(weight, weight.shape[1], 8)
            tensors = {".weight_scale": torch.from_numpy(scales).bfloat16()}
        else:
            unsigned, scales, zeros, numbers = asymmetric(weight, weight.shape[1], 8)
            codes = unsigned - 128
            tensors = {".weight_scale": torch.from_numpy(scales)}
            tensors[".weight_zero_point"] = torch.from_numpy(zeros - 128).to(torch.int8)
        tensors[".weight"] = torch.from_numpy(codes).to(torch.int8)
        tensors[".input_scale"] = torch.tensor([0.02])
        return tensors, numbers

    return pack


def fp8(block: tuple[int, int] | None, scale_name: str, *, scalar: bool = False, powers: bool = False) -> Pack:
    """e4m3 with float32 scales for blocks, for outputs (None), or for the matrix; `powers`: scales are e8m0."""

    def pack(weight: np.ndarray, _rng: np.random.Generator) -> Packed:
        rows, columns = block or (weight.shape if scalar else (1, weight.shape[1]))
        grid = np.empty((-(-len(weight) // rows), -(-weight.shape[1] // columns)), np.float32)
        codes, numbers = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), np.empty(weight.shape)
        for i, j in np.ndindex(grid.shape):
            place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            grid[i, j] = np.abs(weight[place]).max() / 448
            if powers:
                grid[i, j] = 2.0 ** np.ceil(np.log2(grid[i, j]))
            codes[place] = torch.from_numpy(weight[place] / grid[i, j]).to(torch.float8_e4m3fn)
            numbers[place] = codes[place].double().numpy() * float(grid[i, j])
        scales = torch.from_numpy(grid)
        if powers:
            scales = scales.to(torch.float8_e8m0fnu)
        return {".weight": codes, scale_name: scales.reshape(()) if scalar else scales}, numbers

    return pack


def nf4(*, is_nested: bool, block: int = 64) -> Pack:
    def pack(weight: np.ndarray, _rng: np.random.Generator) -> Packed:
        blocks = weight.reshape(-1, block)
        factors = np.abs(blocks).max(1).astype(np.float32)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": weight.shape}
        tensors: Tensors = {".weight.quant_map": torch.tensor(NF4)}
        if is_nested:
            offset = float(factors.mean())
            table = np.linspace(-1, 1, 256).astype(np.float32)  # files bring their own
            rest = (factors - offset).astype(np.float64)
            outer = np.array([np.abs(part).max() for part in np.array_split(rest, range(256, len(rest), 256))])
            outer = outer.astype(np.float32).repeat(256)[: len(rest)]
            chosen = np.abs(rest[:, None] / outer[:, None] - table).argmin(1)
            factors = table[chosen].astype(np.float64) * outer + offset
            tensors |= {
                ".weight.absmax": torch.from_numpy(chosen.astype(np.uint8)),
                ".weight.nested_absmax": torch.from_numpy(outer[::256].copy()),
                ".weight.nested_quant_map": torch.from_numpy(table),
            }
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        else:
            tensors[".weight.absmax"] = torch.from_numpy(factors)
        codes = np.abs(blocks[..., None] / factors[:, None, None] - np.array(NF4)).argmin(-1)
        flat = codes.reshape(-1, 2).astype(np.uint8)
        tensors[".weight"] = torch.from_numpy(flat[:, :1] << 4 | flat[:, 1:])
        raw = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
        tensors[".weight.quant_state.bitsandbytes__nf4"] = torch.from_numpy(raw)
        return tensors, (np.array(NF4)[codes] * factors[:, None].astype(np.float64)).reshape(weight.shape)

    return pack


def llm_int8(weight: np.ndarray, _rng: np.random.Generator) -> Packed:
    factors = np.abs(weight).max(1).astype(np.float32)
    codes = np.rint(weight / factors[:, None] * 127)
    tensors = {
        ".weight": torch.from_numpy(codes).to(torch.int8),
        ".SCB": torch.from_numpy(factors),
        ".weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, codes * factors[:, None].astype(np.float64) / 127


def compressed(format: str, **weights: Any) -> dict[str, Any]:
    """The quantization_config of compressed-tensors."""
    is_w8a8 = format != "pack-quantized"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8} if is_w8a8 else None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
    }


@dataclass(frozen=True, kw_only=True)
class Format:
    """A layout.

    Attributes:
        config: the quantization_config.
        form: how a converted checkpoint keeps the matrices; None: dequantized.
        has_head: whether lm_head is quantized, too.
    """

    config: Mapping[str, Any]
    pack: Pack
    form: str | None
    has_head: bool = False


def _gptq(bits: int, **options: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False, **options}


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FORMATS: dict[str, Format] = {
    "awq": Format(
        config={"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        pack=awq(32), form="int4",
    ),
    "awq, groups of 16": Format(  # which the CPU kernels do not take
        config={"quant_method": "awq", "bits": 4, "group_size": 16, "version": "GEMM"}, pack=awq(16), form="int4"
    ),
    "gptq": Format(config=_gptq(4), pack=gptq(32, 4), form="int4"),
    "gptq v2": Format(
        config=_gptq(4, checkpoint_format="gptq_v2", lm_head=True),
        pack=gptq(64, 4, is_v1=False), form="int4", has_head=True,
    ),
    "gptq act-order": Format(config=_gptq(4, desc_act=True), pack=gptq(32, 4, act_order=True), form=None),
    "gptq 2 bits": Format(
        config=_gptq(2, checkpoint_format="gptq_v2"), pack=gptq(32, 2, is_v1=False), form="int4"
    ),
    "gptq 3 bits": Format(config=_gptq(3), pack=gptq(128, 3), form="int4"),
    "gptq 8 bits": Format(config=_gptq(8, sym=True), pack=gptq(64, 8, sym=True), form="int8"),
    "gptq 8 bits, zero points": Format(
        config=_gptq(8, checkpoint_format="gptq_v2"), pack=gptq(64, 8, is_v1=False), form=None
    ),
    "compressed-tensors W4A16": Format(
        config=compressed("pack-quantized", **_INT4, symmetric=True), pack=pack_quantized(32, 4), form="int4"
    ),
    "compressed-tensors W4A16 asymmetric": Format(
        config=compressed("pack-quantized", **_INT4, symmetric=False),
        pack=pack_quantized(64, 4, sym=False), form="int4",
    ),
    "compressed-tensors W4A16 act-order": Format(
        config=compressed("pack-quantized", **_INT4, actorder="group"),
        pack=pack_quantized(32, 4, act_order=True), form=None,
    ),
    "compressed-tensors W8A16": Format(
        config=compressed("pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
        pack=pack_quantized(0, 8), form="int8",
    ),
    "compressed-tensors W8A8": Format(
        config=compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
        pack=int_quantized(), form="int8",
    ),
    "compressed-tensors W8A8 asymmetric": Format(
        config=compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
        pack=int_quantized(sym=False), form=None,
    ),
    "compressed-tensors FP8": Format(
        config=compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        pack=fp8(None, ".weight_scale"), form="fp8",
    ),
    "compressed-tensors FP8 blocks": Format(
        config=compressed("naive-quantized", num_bits=8, type="float", strategy="block", block_structure=[64, 32]),
        pack=fp8((64, 32), ".weight_scale"), form="fp8",
    ),
    "fp8 blocks": Format(
        config=_FP8 | {"weight_block_size": [128, 128]}, pack=fp8((128, 128), ".weight_scale_inv"), form="fp8"
    ),
    "fp8 blocks, powers of two": Format(
        config=_FP8 | {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
        pack=fp8((128, 128), ".weight_scale_inv", powers=True), form="fp8",
    ),
    "fp8 blocks, cut off": Format(
        config=_FP8 | {"weight_block_size": [96, 96]}, pack=fp8((96, 96), ".weight_scale_inv"), form=None
    ),
    "fp8 matrices": Format(config=_FP8, pack=fp8(None, ".weight_scale", scalar=True), form="fp8", has_head=True),
    "nf4": Format(config=_BNB, pack=nf4(is_nested=False), form=None),
    "nf4, double": Format(
        config=_BNB | {"bnb_4bit_use_double_quant": True}, pack=nf4(is_nested=True), form=None
    ),
    "LLM.int8": Format(config={"quant_method": "bitsandbytes", "load_in_8bit": True}, pack=llm_int8, form="int8"),
}  # fmt: skip


def write_quantized(folder: Path, name: str, *, experts: bool = False, **overrides: Any) -> tuple[Path, Path]:
    """A folder of the format `name`, and one of the same model with the numbers in float32."""
    make = tiny_qwen3_moe if experts else tiny_llama
    plain = make(folder / "plain", **SHAPE | overrides)
    quantized = folder / "quantized"
    shutil.copytree(plain, quantized)
    quantize_folder(quantized, plain, FORMATS[name])
    return quantized, plain


def quantize_folder(quantized: Path, plain: Path, format: Format) -> None:
    """Replace the weights of linears in both folders, which hold the same model."""
    rng = np.random.default_rng(0)
    tensors, numbers = load_file(plain / "model.safetensors"), load_file(plain / "model.safetensors")
    for name in list(tensors):
        is_linear = name.endswith("_proj.weight") or (format.has_head and name == "lm_head.weight")
        if is_linear:
            packed, weight = format.pack(tensors.pop(name).double().numpy(), rng)
            module = name.removesuffix(".weight")
            tensors |= {f"{module}{ending}": tensor.contiguous() for ending, tensor in packed.items()}
            numbers[name] = torch.from_numpy(weight).float().contiguous()
    save_file(tensors, quantized / "model.safetensors", {"format": "pt"})
    save_file(numbers, plain / "model.safetensors", {"format": "pt"})
    edit_config(quantized, quantization_config=dict(format.config))


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
