"""The stacks of experts in folders of gpt-oss: gates and ups in turn, in bfloat16 (transposed) or in MXFP4."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from stellarbyte.checkpoint.errors import CheckpointError, one_line
from stellarbyte.checkpoint.hugging_face import mxfp4
from stellarbyte.checkpoint.plan import PlannedTensor, assembled
from stellarbyte.checkpoint.safetensors_file import DTYPES, TensorInfo

# E experts, C hidden size, I inner size of an expert, O = 2 I rows of gates and ups in turn, or C of downs

_STACK = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.(gate_up|down)_proj)(_bias|_blocks|_scales)?")
_BLOCKS, _SCALES, _BIAS = "_blocks", "_scales", "_bias"


def is_stack(name: str) -> bool:
    """Whether `interleaved_experts` plans this tensor."""
    return _STACK.fullmatch(name) is not None


def interleaved_experts(folder: Path, headers: Mapping[str, TensorInfo]) -> dict[str, PlannedTensor]:
    """gate_up_proj [E, 2 I, C], gates above ups, down_proj [E, C, I] and their biases, of all layers.

    Files hold [E, C, 2 I] and [E, I, C], or in MXFP4 blocks [E, O, inputs / 32, 16] and scales [E, O, inputs / 32],
    which become bfloat16; gates are rows 0, 2 … and ups rows 1, 3 … of the 2 I. One expert at a time is decoded.

    Raises:
        CheckpointError: a tensor is of another kind, or a part of one is missing; the message names it.
    """
    planned: dict[str, PlannedTensor] = {}
    for name, info in headers.items():
        found = _STACK.fullmatch(name)
        if found is None:
            continue
        module, is_gated, kind = found[1], found[2] == "gate_up", found[3]
        if kind == _SCALES:
            if f"{module}{_BLOCKS}" not in headers:
                raise CheckpointError(f"{folder} lacks the tensor {module}{_BLOCKS}, of which it holds the scales.")
        elif kind == _BLOCKS:
            if module in headers:
                raise CheckpointError(f"{folder} holds {module} twice: in MXFP4, and not.")
            planned[module] = _packed(folder, headers, module, is_gated)
        else:
            _require(info.dtype in DTYPES, name, info, f"only {', '.join(DTYPES)} are supported")
            if kind == _BIAS:
                _require(len(info.shape) == 2, name, info, "biases are [experts, outputs]")
                planned[name] = PlannedTensor(
                    dtype=DTYPES[info.dtype], shape=info.shape, read=partial(_read_bias, name, info, is_gated)
                )
            else:
                _require(len(info.shape) == 3, name, info, "stacks are [experts, inputs, outputs]")
                count, num_inputs, num_outputs = info.shape
                read = partial(_transposed, name, info)
                planned[name] = _stack((count, num_outputs, num_inputs), DTYPES[info.dtype], is_gated, read)
    return planned


def _packed(folder: Path, headers: Mapping[str, TensorInfo], module: str, is_gated: bool) -> PlannedTensor:
    name, of_scales = f"{module}{_BLOCKS}", f"{module}{_SCALES}"
    if of_scales not in headers:
        raise CheckpointError(f"{folder} lacks the tensor {of_scales}, of which it holds the blocks.")
    blocks, scales = headers[name], headers[of_scales]
    for key, info in ((name, blocks), (of_scales, scales)):
        _require(info.dtype == "U8", key, info, "MXFP4 is U8")
    is_packed = len(blocks.shape) == 4 and mxfp4.is_packed(blocks.shape, scales.shape)
    _require(is_packed, name, blocks, f"with scales of {list(scales.shape)} it must be {[*scales.shape, 16]}")

    def read(expert: int) -> torch.Tensor:
        try:
            return mxfp4.decoded(_of_expert(name, blocks, expert), _of_expert(of_scales, scales, expert))
        except ValueError as error:
            raise CheckpointError(f"{scales.file} cannot be decoded: in {of_scales}, {error}.") from error

    count, num_outputs, num_blocks, _ = blocks.shape
    return _stack((count, num_outputs, num_blocks * mxfp4.BLOCK), torch.bfloat16, is_gated, read)


def _stack(
    shape: tuple[int, int, int], dtype: torch.dtype, is_gated: bool, read: Callable[[int], torch.Tensor]
) -> PlannedTensor:
    """The matrices [O, inputs] of all experts that `read` returns."""

    def piece(expert: int) -> torch.Tensor:
        return _in_order(read(expert)) if is_gated else read(expert)

    return assembled(
        shape,
        [
            ((expert,), PlannedTensor(dtype=dtype, shape=shape[1:], read=partial(piece, expert)))
            for expert in range(shape[0])
        ],
    )


def _in_order(rows: torch.Tensor) -> torch.Tensor:
    """Gates and ups in turn → gates above ups, along the first dimension."""
    return torch.cat((rows[0::2], rows[1::2]))


def _of_expert(name: str, info: TensorInfo, expert: int) -> torch.Tensor:
    try:
        with safe_open(info.file, framework="pt") as tensors:
            matrix: torch.Tensor = tensors.get_slice(name)[expert]
            return matrix
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{info.file} cannot be read: {one_line(error)}.") from error


def _transposed(name: str, info: TensorInfo, expert: int) -> torch.Tensor:
    return _of_expert(name, info, expert).T


def _read_bias(name: str, info: TensorInfo, is_gated: bool) -> torch.Tensor:
    biases = torch.stack([_of_expert(name, info, expert) for expert in range(info.shape[0])])
    return _in_order(biases.T).T.contiguous() if is_gated else biases


def _require(is_right: bool, name: str, info: TensorInfo, expected: str) -> None:
    if not is_right:
        raise CheckpointError(f"{info.file} holds {name} as {info.dtype} {list(info.shape)}; {expected}.")
