"""Quantized matrices of a source as tensors of a conversion."""

import re
from collections.abc import Callable, Mapping
from functools import partial

import torch

from stellarbyte.checkpoint.plan import PlannedTensor
from stellarbyte.checkpoint.quantized.matrix import CODES, SCALES, ZEROS, Kind
from stellarbyte.checkpoint.quantized.source import QuantizedSource, Read, SourceMatrix

# N outputs, K inputs, G groups of inputs

_CODES: Mapping[Kind, tuple[torch.dtype, int]] = {  # dtype, and codes in one number
    "int4": (torch.uint8, 2),
    "int8": (torch.int8, 1),
    "fp8": (torch.float8_e4m3fn, 1),
}
_EXPERT = re.compile(r"\.experts\.\d+\.")

TakeRows = Callable[[torch.Tensor], torch.Tensor]


def without_uneven_experts(source: QuantizedSource) -> dict[str, SourceMatrix]:
    """The matrices; those of experts, which become stacks, are kept as they are only if all experts are alike."""
    matrices = source.matrices
    experts = {name for name in matrices if is_of_expert(name)}
    forms: set[tuple[object, ...] | None] = {None for name in source.plain if is_of_expert(name)}
    for name in experts:
        parts = matrices[name].parts
        form = None if parts is None else (parts.kind, matrices[name].shape[1] // parts.num_groups, parts.scale_dtype)
        forms.add(form)
    if len(forms) <= 1:
        return dict(matrices)
    return {
        name: SourceMatrix(shape=matrix.shape, dequantized=matrix.dequantized) if name in experts else matrix
        for name, matrix in matrices.items()
    }


def is_of_expert(name: str) -> bool:
    """Whether a tensor is of a single expert, one of a stack."""
    return _EXPERT.search(name) is not None


def planned_parts(name: str, matrix: SourceMatrix, rows: slice, take_rows: TakeRows) -> dict[str, PlannedTensor]:
    """The tensors that keep the rows of a matrix, in an order of their own, as parameter `name`."""
    parts, num_rows = matrix.parts, rows.stop - rows.start
    assert parts is not None
    dtype, codes_in_one = _CODES[parts.kind]
    planned = {CODES: (parts.codes, dtype, matrix.shape[1] // codes_in_one)}
    planned[SCALES] = parts.scales, parts.scale_dtype, parts.num_groups
    if parts.zeros is not None:
        planned[ZEROS] = parts.zeros, torch.uint8, parts.num_groups
    return {
        f"{name}{ending}": PlannedTensor(dtype=dtype, shape=(num_rows, width), read=partial(_read, read, take_rows))
        for ending, (read, dtype, width) in planned.items()
    }


def planned_numbers(matrix: SourceMatrix, rows: slice, take_rows: TakeRows) -> PlannedTensor:
    """The rows of a matrix, dequantized, in float32."""
    shape = (rows.stop - rows.start, matrix.shape[1])
    return PlannedTensor(dtype=torch.float32, shape=shape, read=partial(_read, matrix.dequantized, take_rows))


def _read(read: Read, take_rows: TakeRows) -> torch.Tensor:
    return take_rows(read())
