"""Products with matrices in groups against float64 products with the numbers that the checkpoint's form stands for."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte.checkpoint.quantized.matrix import Kind, QuantizedMatrix
from stellarbyte.ops.triton.gates import GATES
from stellarbyte.ops.triton.grouped.product import MAX_ROWS, dequantize, grouped_linear
from stellarbyte.ops.triton.grouped.rows import RowsTile, rows_product
from stellarbyte.ops.triton.grouped.vector import VectorTile, vector_product, vector_tile
from stellarbyte.ops.triton.grouped.weights import GroupedWeight, grouped, takes
from tests.support.cases import SLOW_WITHOUT_GPU, each_value_once

EPS = 1e-5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(
    kind: Kind, shape: tuple[int, int], group: int, *, has_zeros: bool | str = False, seed: int = 0
) -> QuantizedMatrix:
    """Any codes, as checkpoints keep them."""
    chance = torch.Generator().manual_seed(seed)
    num_outputs, num_inputs = shape
    num_groups = num_inputs // group
    scales = 0.02 + 0.05 * torch.rand(num_outputs, num_groups, generator=chance)
    if kind != "int4":
        codes = torch.randint(-127, 128, shape, generator=chance)
        scales = scales / 16
        dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
        return QuantizedMatrix(kind=kind, codes=codes.float().to(dtype), scales=scales)
    codes = torch.randint(0, 256, (num_outputs, num_inputs // 2), generator=chance).to(torch.uint8)
    zeros = torch.full((num_outputs, num_groups), 8)
    if has_zeros == "real":
        between = 20 * torch.rand(zeros.shape, generator=chance) - 2
        return QuantizedMatrix(kind="int4", codes=codes, scales=scales.half(), zeros=between.half())
    if has_zeros:
        zeros = torch.randint(0, 17, zeros.shape, generator=chance)
    return QuantizedMatrix(kind="int4", codes=codes, scales=scales.half(), zeros=zeros.to(torch.uint8))


def numbers_of(matrix: QuantizedMatrix) -> torch.Tensor:
    """float64 [N, K] by the documented layout: scale · (code - zero), columns 2i (low bits) and 2i + 1 of a byte."""
    if matrix.kind == "int4":
        codes = torch.empty(len(matrix.codes), 2 * matrix.codes.shape[1], dtype=torch.float64)
        codes[:, 0::2], codes[:, 1::2] = (matrix.codes % 16).double(), (matrix.codes // 16).double()
    else:
        codes = matrix.codes.double()
    zeros = torch.zeros(matrix.scales.shape) if matrix.zeros is None else matrix.zeros
    size = codes.shape[1] // matrix.scales.shape[1]
    scales, zeros = (part.double().repeat_interleave(size, dim=1) for part in (matrix.scales, zeros))
    return scales * (codes - zeros)


def on(device: torch.device, weight: GroupedWeight) -> GroupedWeight:
    tensors: dict[str, Any] = {k: v.to(device) for k, v in vars(weight).items() if isinstance(v, torch.Tensor)}
    return dataclasses.replace(weight, **tensors)


Form = tuple[Kind, int, bool | str]  # group; zero points: none, integers (True) or "real"
FORMS: list[Form] = [
    ("int4", 32, True), ("int4", 128, False), ("int4", 64, True), ("int4", 256, True), ("int8", 64, False),
    ("fp8", 128, False), ("int8", 32, False), ("fp8", 32, False), ("int4", 32, "real"), ("int4", 64, "real"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "num_rows", "shape", "parts"),
    each_value_once(
        FORMS, [1, 2, 20, 70, 260], [(48, 256), (37, 512)],
        [("bias", "residual", "scale"), ("gate", "bias"), ("norm", "gate"), ("norm",), ()], mark=SLOW_WITHOUT_GPU,
    ),
    ids=str,
)  # fmt: skip
def test_a_product_with_what_stands_around_it(
    form: Form,
    num_rows: int,
    shape: tuple[int, int],
    parts: tuple[str, ...],
    device: torch.device,
) -> None:
    kind, group, has_zeros = form
    if "norm" in parts and (num_rows > 1 or kind != "int4"):
        parts = tuple(part for part in parts if part != "norm")
    num_outputs, num_inputs = shape
    height = num_outputs * 2 if "gate" in parts else num_outputs
    matrix = stored(kind, (height, num_inputs), group, has_zeros=has_zeros)
    x, norm, bias = random(num_rows, num_inputs, seed=1), random(num_inputs, seed=2), random(height, seed=3)
    residual, scale = random(num_rows, num_outputs, seed=4), random(num_outputs, seed=5)
    expected = x.double()
    if "norm" in parts:
        expected = expected * torch.rsqrt(expected.pow(2).mean(-1, keepdim=True) + EPS) * norm
    expected = expected @ numbers_of(matrix).T
    expected = expected + bias if "bias" in parts else expected
    if "gate" in parts:
        expected = F.silu(expected[:, :num_outputs]) * expected[:, num_outputs:]
    expected = expected * scale if "scale" in parts else expected
    expected = expected + residual if "residual" in parts else expected
    found = grouped_linear(
        x.to(device),
        on(device, grouped([matrix], bias if "bias" in parts else None)),
        norm_K=norm.to(device) if "norm" in parts else None,
        eps=EPS,
        gate=GATES["silu"] if "gate" in parts else 0,
        residual_TN=residual.to(device) if "residual" in parts else None,
        branch_scale_N=scale.to(device) if "scale" in parts else None,
    )
    torch.testing.assert_close(found.cpu().double(), expected, atol=3e-4, rtol=2e-5)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_dequantized_matrices_are_the_checkpoints_numbers(form: Form, device: torch.device) -> None:
    """Of matrices below each other, whose groups and scales differ; by torch, by the kernel, and of some rows."""
    kind, group, has_zeros = form
    matrices = [
        stored(kind, (40, 256), group, has_zeros=has_zeros),
        stored(kind, (24, 256), max(64, group), seed=1),
        stored(kind, (8, 256), group, has_zeros=has_zeros, seed=2),
    ]
    weight = on(device, grouped(matrices))
    expected = torch.cat([numbers_of(matrix) for matrix in matrices])
    assert (weight.num_outputs, weight.num_inputs) == (72, 256)
    for found in (weight.dequantized(), dequantize(weight, torch.float32)):
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(weight.rows(slice(40, 64)).dequantized().cpu().double(), expected[40:64])


def test_what_the_kernels_take() -> None:
    assert takes(stored("int4", (8, 96), 32)) and takes(stored("int8", (8, 192), 96))
    assert not takes(stored("int4", (8, 64), 16)) and not takes(stored("fp8", (8, 96), 48))


HALVES = [(320, 32), (352, 32), (320, 64)]  # inputs and groups: one with half a slab at the end


@pytest.mark.parametrize("tile", [VectorTile(8, 2, 2, 2), VectorTile(4, 1, 16, 4), VectorTile(16, 3, 4, 1)], ids=str)
@pytest.mark.parametrize(("num_inputs", "group"), HALVES)
def test_any_tile_of_one_row(tile: VectorTile, num_inputs: int, group: int, device: torch.device) -> None:
    matrix, x = stored("int4", (37, num_inputs), group, has_zeros=True), random(1, num_inputs, seed=1)
    out = torch.empty(1, 37, device=device)
    vector_product(x.to(device), on(device, grouped([matrix])), out, tile=tile)
    torch.testing.assert_close(out.cpu().double(), x.double() @ numbers_of(matrix).T, atol=3e-4, rtol=2e-5)


@pytest.mark.parametrize("dtypes", [("float16",), ("bfloat16",), ("float32",), ("float16", "bfloat16")], ids=str)
@pytest.mark.parametrize("num_rows", [1, 5])
def test_scales_of_any_dtypes(dtypes: tuple[str, ...], num_rows: int, device: torch.device) -> None:
    """Matrices below each other keep theirs."""
    matrices = [
        dataclasses.replace(matrix, scales=matrix.scales.to(getattr(torch, dtype)))
        for dtype, matrix in ((dtype, stored("int4", (24, 128), 32, has_zeros=True)) for dtype in dtypes)
    ]
    numbers, x = torch.cat([numbers_of(matrix) for matrix in matrices]), random(num_rows, 128, seed=1)
    weight = on(device, grouped(matrices))
    torch.testing.assert_close(weight.dequantized().cpu().double(), numbers, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(dequantize(weight, torch.float32).cpu().double(), numbers, rtol=1e-7, atol=1e-9)
    found = grouped_linear(x.to(device), weight)
    torch.testing.assert_close(found.cpu().double(), x.double() @ numbers.T, atol=3e-4, rtol=2e-5)


TILES = [
    RowsTile(8, 16, 4, 4, 3),
    RowsTile(16, 32, 2, 4, 2, 2),
    RowsTile(8, 64, 1, 4, 4, 4),
    RowsTile(8, 16, 1, 4, 3, 1, 3),
    RowsTile(16, 16, 1, 4, 3, 2, 2, scales_first=True),
    RowsTile(16, 16, 2, 4, 3, scales_first=True),
]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("num_inputs", "group"), HALVES)
def test_any_tile_of_several_rows(tile: RowsTile, num_inputs: int, group: int, device: torch.device) -> None:
    """Also of more rows than a program has, and of slabs that split, steps or parts do not divide."""
    matrix, x = stored("int4", (37, num_inputs), group, has_zeros=True), random(11, num_inputs, seed=1)
    out = torch.empty(11, 37, device=device)
    rows_product(x.to(device), on(device, grouped([matrix])), out, tile=tile)
    torch.testing.assert_close(out.cpu().double(), x.double() @ numbers_of(matrix).T, atol=3e-4, rtol=2e-5)


@pytest.mark.parametrize("tile", [RowsTile(8, 16, 2, 4, 3, 2, 2), RowsTile(16, 64, 1, 4, 3, 2, 3)], ids=str)
def test_parts_with_what_stands_around_them(tile: RowsTile, device: torch.device) -> None:
    """Bias, gate, scale and residual follow the sum of all parts."""
    matrix, x, bias = stored("int4", (74, 320), 32, has_zeros=True), random(11, 320, seed=1), random(74, seed=2)
    residual, scale, out = random(11, 37, seed=3), random(37, seed=4), torch.empty(11, 37, device=device)
    both = x.double() @ numbers_of(matrix).T + bias
    expected = residual + scale * (F.silu(both[:, :37]) * both[:, 37:])
    rows_product(
        x.to(device), on(device, grouped([matrix], bias)), out, gate=GATES["silu"], residual_TN=residual.to(device),
        branch_scale_N=scale.to(device), tile=tile,
    )  # fmt: skip
    torch.testing.assert_close(out.cpu().double(), expected, atol=3e-4, rtol=2e-5)


def test_one_row_in_bfloat16(device: torch.device) -> None:
    """Read four numbers at a time; products and sums in float32."""
    matrix = stored("int4", (48, 256), 32, has_zeros=True)
    x, norm = random(1, 256, seed=1).bfloat16(), random(256, seed=2).bfloat16()
    expected = x.double() * torch.rsqrt(x.double().pow(2).mean() + EPS) * norm.double() @ numbers_of(matrix).T
    weight, out = on(device, grouped([matrix])), torch.empty(1, 48, device=device)
    vector_product(x.to(device), weight, out, norm_K=norm.to(device), eps=EPS, tile=vector_tile(256))
    torch.testing.assert_close(out.cpu().double(), expected, rtol=2e-5, atol=3e-4)


@pytest.mark.parametrize("num_rows", [2, 20, 70, 260])
def test_several_rows_in_bfloat16(num_rows: int, device: torch.device) -> None:
    """Codes less integers are exact in front of the matrix units, and real zero points rounded; of many rows with int4,
    their products with scales are rounded, and in the dequantized matrix of more rows all numbers are."""
    if device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies no bfloat16 matrices")
    for kind, group, has_zeros in FORMS:
        matrix, x = stored(kind, (96, 512), group, has_zeros=has_zeros), random(num_rows, 512, seed=1).bfloat16()
        numbers = numbers_of(matrix)
        if num_rows > MAX_ROWS:
            numbers = numbers.bfloat16().double()
        elif kind == "int4":
            assert matrix.zeros is not None
            zeros, scales = (
                part.double().repeat_interleave(group, dim=1) for part in (matrix.zeros.bfloat16(), matrix.scales)
            )
            steps = (matrix.unpacked_codes() - zeros).bfloat16().double()  # exact for integers
            numbers = steps * scales
            if num_rows > 16:
                numbers = (steps * scales.bfloat16().double()).bfloat16().double()
        expected = x.double() @ numbers.T
        found = grouped_linear(x.to(device), on(device, grouped([matrix])))
        torch.testing.assert_close(found.cpu().double(), expected, rtol=2**-8, atol=2e-3)
