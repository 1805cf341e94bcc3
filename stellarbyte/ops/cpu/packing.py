"""Weights in the layout of the CPU kernels: panels of 16 rows, float32 or quantized."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from stellarbyte.ops.cpu.panels.sizes import INT4_GROUP, INT8_GROUP, PANEL_ROWS

# N rows, K columns, P panels of R rows, G columns that share a scale, L layers

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Number = TypeVar("Number", bound=np.generic)

# Where a word's adjacent columns are: bytes of 4, and the bits of 8.
_ORDER_OF_BYTES = np.array([0, 2, 1, 3])
_SHIFTS_OF_NIBBLES = np.array([16 * (i % 2) + 4 * (i // 2) for i in range(8)], np.uint32)
_LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max


class PackedWeight(NamedTuple):
    """A matrix [N, K] for `linear.linear`; rows are padded with zeros to whole panels."""

    # [P, K, R] float32, or uint8 of fp8; int8: int32 [P, K/4, R], int4: uint32 [P, K/8, R], words of `_words_of_bytes`
    # and `_words_of_nibbles`
    weights: npt.NDArray[Any]
    scales: Floats  # [P, K/G, R]; empty for float32
    minima: npt.NDArray[Any]  # [P, K/G, R] float32 for int4; empty for others, of uint8 for fp8

    @property
    def num_bytes(self) -> int:
        return self.weights.nbytes + self.scales.nbytes + self.minima.nbytes


class StackedLinears(NamedTuple):
    """The linears that share an input, of all layers that have one: `PackedWeight`s with a leading layer dimension."""

    weights: npt.NDArray[Any]
    scales: Floats
    minima: npt.NDArray[Any]
    bias_LN: Floats  # [L, P · R] in the rows' order, or [L, 0]
    places_L: Integers  # of each of the model's layers in this stack; -1: it has none of them
    widths: Integers  # rows of each linear
    first: int  # number of the first linear in the adapter bank


class QuantizedRows(NamedTuple):
    """A matrix [N, K] row by row: what `panels_of` packs. Its parts may be joined with those of others."""

    # [N, K] float32, int8, or uint8 of fp8; int4: uint8 [N, K/2], columns 2i (low bits) and 2i+1
    weights: npt.NDArray[Any]
    scales: Floats  # [N, K/G]; [N, 0] for float32
    minima: npt.NDArray[Any]  # [N, K/G] float32 for int4; [N, 0] for others, of uint8 for fp8


def quantized_rows(matrix_NK: Floats, quantization: str) -> QuantizedRows:
    """A matrix as "none" (float32), "int8", "fp8" or "int4".

    int8: q · scale, scale = max|w| / 127 over 64 columns of a row; fp8: the same with e4m3's largest number, 448.
    int4: q · scale + minimum, q = 0..15, over 32.

    Raises:
        ValueError: K is not a multiple of the quantization's group.
    """
    rows, columns = matrix_NK.shape
    nothing = np.zeros((rows, 0), np.float32)
    if quantization == "none":
        return QuantizedRows(matrix_NK.astype(np.float32, copy=False), nothing, nothing)
    group = INT4_GROUP if quantization == "int4" else INT8_GROUP
    if columns % group:
        raise ValueError(f"{quantization} needs matrices with a multiple of {group} columns; one has {columns}")
    groups_NGC = matrix_NK.reshape(rows, columns // group, group)
    if quantization == "int8":
        scale_NG = np.maximum(np.abs(groups_NGC).max(axis=-1), np.float32(1e-30)) / np.float32(127)
        integers = np.rint(groups_NGC / scale_NG[..., None]).astype(np.int8)
        return QuantizedRows(integers.reshape(matrix_NK.shape), scale_NG, nothing)
    if quantization == "fp8":
        scale_NG = np.maximum(np.abs(groups_NGC).max(axis=-1), np.float32(1e-30)) / np.float32(_LARGEST_FP8)
        numbers = torch.from_numpy(groups_NGC / scale_NG[..., None]).to(torch.float8_e4m3fn)
        return QuantizedRows(numbers.view(torch.uint8).numpy().reshape(matrix_NK.shape), scale_NG, no_minima(rows))
    minimum_NG = groups_NGC.min(axis=-1)
    scale_NG = np.maximum((groups_NGC.max(axis=-1) - minimum_NG) / np.float32(15), np.float32(1e-30))
    nibbles = np.rint((groups_NGC - minimum_NG[..., None]) / scale_NG[..., None]).clip(0, 15).astype(np.uint8)
    nibbles = nibbles.reshape(matrix_NK.shape)
    return QuantizedRows(nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), scale_NG, minimum_NG)


def no_minima(num_rows: int) -> npt.NDArray[np.uint8]:
    """[N, 0]: those of fp8."""
    return np.zeros((num_rows, 0), np.uint8)


def joined_rows(matrices: Sequence[QuantizedRows], join: Callable[..., npt.NDArray[Any]]) -> QuantizedRows:
    """One matrix of the rows of several; `join` takes arrays with a row for each of theirs."""
    return QuantizedRows(*(join(*parts) for parts in zip(*matrices, strict=True)))


def panels_of(rows: QuantizedRows) -> PackedWeight:
    """The panels of a matrix; rows of zeros complete the last one."""
    missing = -len(rows.weights) % PANEL_ROWS
    weights, scales, minima = (
        np.concatenate([part, np.zeros((missing, part.shape[1]), part.dtype)]) if missing else part for part in rows
    )
    if weights.dtype == np.int8:
        weights = _words_of_bytes(weights)
    elif minima.size:
        weights = _words_of_nibbles(weights)
    return PackedWeight(
        _panels(weights),
        *(_panels(part) if part.size else np.zeros((1, 0, PANEL_ROWS), part.dtype) for part in (scales, minima)),
    )


def pack(matrix_NK: Floats, quantization: str) -> PackedWeight:
    """The panels of a matrix, quantized as `quantized_rows` does it.

    Raises:
        ValueError: as `quantized_rows`.
    """
    return panels_of(quantized_rows(matrix_NK, quantization))


def panels_below_each_other(matrices: Iterable[QuantizedRows], count: int) -> PackedWeight:
    """The panels of `count` matrices of one shape, one matrix at a time: the result is the only large memory."""
    stacked: list[npt.NDArray[Any]] = []
    num_panels = 0
    for i, rows in enumerate(matrices):
        packed = panels_of(rows)
        if not stacked:
            num_panels = len(packed.weights)
            stacked = [
                np.empty((count * len(part) if part.size else 1, *part.shape[1:]), part.dtype) for part in packed
            ]
        for target, part in zip(stacked, packed, strict=True):
            if part.size:
                target[i * num_panels : (i + 1) * num_panels] = part
    return PackedWeight(*stacked)


def unpack(weight: PackedWeight) -> Floats:
    """[P · R, K]: the matrix that products read, padding included."""
    codes = _rows(weight.weights)
    if codes.dtype == np.float32:
        return codes
    if codes.dtype == np.uint8:
        numbers = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    elif codes.dtype == np.int32:
        numbers = np.ascontiguousarray(codes).view(np.int8).reshape(-1, 4)[:, _ORDER_OF_BYTES].astype(np.float32)
        numbers = numbers.reshape(len(codes), -1)
    else:
        nibbles = (codes[:, :, None] >> _SHIFTS_OF_NIBBLES) & 15
        numbers = nibbles.reshape(len(codes), -1).astype(np.float32)
    scales = _rows(weight.scales)
    group = numbers.shape[1] // scales.shape[1]
    numbers = numbers * scales.repeat(group, axis=1)
    return numbers + _rows(weight.minima).repeat(group, axis=1) if weight.minima.size else numbers


def interleave_gated(gate_NK: npt.NDArray[Number], up_NK: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """Rows of gate and up in the order of `linear` with an activation: 8 gates, their 8 ups, and so on."""
    half = PANEL_ROWS // 2
    missing, others = -len(gate_NK) % half, gate_NK.shape[1:]
    blocks = (len(gate_NK) + missing) // half
    padding = np.zeros((missing, *others), gate_NK.dtype)
    pairs = [np.concatenate([matrix, padding]).reshape(blocks, half, *others) for matrix in (gate_NK, up_NK)]
    return np.stack(pairs, axis=1).reshape(2 * blocks * half, *others)


def interleaved_rows(num_rows: int, half: int) -> npt.NDArray[np.int64]:
    """Where `interleave_gated` puts the rows of gate (half 0) or up (half 1)."""
    rows = np.arange(num_rows)
    return rows // (PANEL_ROWS // 2) * PANEL_ROWS + half * (PANEL_ROWS // 2) + rows % (PANEL_ROWS // 2)


def _words_of_bytes(codes: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """[N, K] int8 → [N, K/4]: adjacent columns are in the two halves of a word."""
    columns = codes.reshape(len(codes), -1, 4)[:, :, _ORDER_OF_BYTES]
    return np.ascontiguousarray(columns).view(np.int32)[:, :, 0]


def _words_of_nibbles(pairs: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """[N, K/2] uint8 → [N, K/8]: adjacent columns are in the two halves of a word."""
    words = np.zeros((len(pairs), pairs.shape[1] // 4), np.uint32)
    for i in range(4):
        both = pairs[:, i::4].astype(np.uint32)
        words |= (both & 15) << _SHIFTS_OF_NIBBLES[2 * i] | (both >> 4) << _SHIFTS_OF_NIBBLES[2 * i + 1]
    return words


def _rows(panels: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """[P, K, R] → [P · R, K]."""
    return panels.transpose(0, 2, 1).reshape(-1, panels.shape[1])


def _panels(matrix: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """[N, K] → contiguous [N/R, K, R]."""
    rows, columns = matrix.shape
    return np.ascontiguousarray(matrix.reshape(rows // PANEL_ROWS, PANEL_ROWS, columns).transpose(0, 2, 1))
