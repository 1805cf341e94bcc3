"""Rows of the GPU kernels for `--deterministic`, bit for bit: alone, in batches, and wherever they stand."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte.backends.gpu.products import PackedWeight, apply_invariant
from stellarbyte.checkpoint.quantized.matrix import QuantizedMatrix
from stellarbyte.compress.quantization.grid import Grid
from stellarbyte.lora.bank import LoraBank
from stellarbyte.model.parts import ATTENTION_INPUT
from stellarbyte.ops.triton.gates import GATES
from stellarbyte.ops.triton.grouped.weights import grouped
from stellarbyte.ops.triton.lora import PROMPT_SEGMENT_ROWS, SEGMENT_ROWS, LoraRows, LoraScratch, expand, shrink
from stellarbyte.ops.triton.moe.layer import Experts, make_scratch, moe
from stellarbyte.ops.triton.moe.routing import Router
from stellarbyte.ops.triton.weights import ExpertWeight, Weight, dequantized, quantize, quantize_experts
from tests.support.cases import SLOW_WITHOUT_GPU
from tests.support.gpu.triton_dots import placeless_dots
from tests.support.models.adapters import random_adapter
from tests.support.models.byte_transformer import make_config

NUM_ROWS = 70  # more than a tile
BATCHES = (2, 3, 16, 17, 64, NUM_ROWS)


@pytest.fixture(autouse=True)
def dots():
    with placeless_dots():
        yield


def random(*shape: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def in_groups(matrix_NK: torch.Tensor) -> QuantizedMatrix:
    grid = Grid(kind="int4")
    levels = grid.fit(matrix_NK)
    return grid.stored(grid.codes(matrix_NK, levels), levels)


def weight_of(form: str, matrix_NK: torch.Tensor, bias_N: torch.Tensor) -> tuple[PackedWeight, torch.Tensor]:
    """And its numbers in float32, rounded as for rows in the bias' dtype."""
    if form == "int4":
        matrix = in_groups(matrix_NK)
        zeros_NK, scales_NK = (
            part.float().repeat_interleave(matrix.group_size, dim=1) for part in (matrix.zeros, matrix.scales)
        )
        steps_NK = matrix.unpacked_codes() - zeros_NK
        return grouped([matrix], bias_N), (steps_NK * scales_NK.to(bias_N.dtype).float()).to(bias_N.dtype).float()
    plain = Weight(matrix_NK=matrix_NK, bias_N=bias_N)
    if form == "none":
        return plain, matrix_NK.float()
    quantized = quantize(plain, form)
    return quantized, dequantized(quantized, torch.float32)


@pytest.mark.parametrize("form", ["none", "int8", "fp8", "int4"])
@pytest.mark.parametrize("sizes", [(96, 160), pytest.param((37, 1504), marks=SLOW_WITHOUT_GPU)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_has_the_same_bits_in_every_batch(
    form: str, sizes: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    if dtype == torch.bfloat16 and form in ("int8", "int4") and device.type == "cpu":
        pytest.skip("Triton's interpreter makes no bfloat16 numbers of integers")
    num_outputs, num_inputs = sizes
    matrix = random(num_outputs, num_inputs, device=device, seed=1).to(dtype)
    x, bias = (
        random(NUM_ROWS, num_inputs, device=device).to(dtype),
        random(num_outputs, device=device, seed=2).to(dtype),
    )
    weight, numbers_NK = weight_of(form, matrix.float() if form == "int4" else matrix, bias)
    alone = torch.cat([apply_invariant(row, weight) for row in x.split(1)])
    expected = x.double() @ numbers_NK.double().T + bias.double()
    tolerance = {"atol": 2e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.2, "rtol": 2e-2}
    torch.testing.assert_close(alone.double(), expected, **tolerance)
    for count in BATCHES:
        for first in {0, (NUM_ROWS - count) // 2, NUM_ROWS - count}:
            rows = slice(first, first + count)
            assert torch.equal(apply_invariant(x[rows].contiguous(), weight), alone[rows]), (count, first)


def test_a_product_is_written_where_it_is_wanted(device: torch.device) -> None:
    x, matrix = random(5, 48, device=device), random(20, 48, device=device, seed=1)
    out = torch.full((5, 20), float("nan"), device=device)
    assert apply_invariant(x, Weight(matrix_NK=matrix), out) is out
    torch.testing.assert_close(out, x @ matrix.T, atol=2e-4, rtol=1e-5)
    assert apply_invariant(x[:0], Weight(matrix_NK=matrix)).shape == (0, 20)


@pytest.mark.parametrize("form", ["none", pytest.param("int8", marks=SLOW_WITHOUT_GPU)])
def test_a_layer_of_experts_has_the_same_bits_in_every_batch(form: str, device: torch.device) -> None:
    """And where the rows are computed in parts."""

    def weight(*shape: int, seed: int) -> ExpertWeight:
        plain = ExpertWeight(matrix_ENK=random(*shape, device=device, seed=seed) * shape[-1] ** -0.5)
        return plain if form == "none" else quantize_experts(plain, form)

    x, matrix = random(64, 144, device=device), random(6, 144, device=device, seed=1) / 12
    router = Router(weight_EC=matrix, top_k=2, score="softmax", renormalizes=True)
    experts = Experts(gate_up=weight(6, 2 * 40, 144, seed=2), down=weight(6, 144, 40, seed=3))
    scratch = make_scratch(50, router, experts)

    def layer(rows: slice) -> torch.Tensor:
        return moe(x[rows], router, experts, scratch, gate=GATES["silu"], is_invariant=True)

    together = layer(slice(None))
    torch.testing.assert_close(together, moe(x, router, experts, scratch, gate=GATES["silu"]), atol=1e-4, rtol=1e-4)
    for first, count in ((0, 1), (31, 1), (63, 1), (5, 2), (40, 3), (7, 17), (1, 33)):
        rows = slice(first, first + count)
        assert torch.equal(layer(rows), together[rows]), (first, count)


def test_what_an_adapter_adds_has_the_same_bits_in_every_batch(device: torch.device) -> None:
    """Decoding rows in segments of 16 and prompts in segments of 64, from one form of the kernels."""
    config = make_config(hidden_size=528, num_hidden_layers=1)
    bank = LoraBank(config, 2, 16, torch.float32, device)
    for slot in (1, 2):
        bank.fill(slot, random_adapter(config, slot, ranks=(4, 16), dora=0.5 * (slot - 1)).packed(config))
    group = bank.projections.shared_inputs[ATTENTION_INPUT]
    shapes = bank.projections.shapes[0][group]
    num_outputs = sum(out for out, _ in shapes)
    x, product = random(64, 528, device=device), random(64, num_outputs, device=device, seed=1)
    scratch = LoraScratch.make(64, 16, device, max_splits=1)

    def adapted(first: int, count: int, slot: int, segment: int, num_empty: int = 0) -> torch.Tensor:
        starts = torch.arange(0, count + segment * num_empty, segment, dtype=torch.int32, device=device)
        rows = LoraRows(
            starts, (count - starts).clamp(0, segment), torch.full_like(starts, slot),
            torch.full((count,), 0.75, device=device), PROMPT_SEGMENT_ROWS,
        )  # fmt: skip
        out = product[first : first + count].clone()
        shrink(x[first : first + count], scratch, rows, bank, 0, group)
        expand(scratch, out, rows, bank, 0, group, has_factors=slot == 2 or segment == SEGMENT_ROWS)
        return out

    for slot in (1, 2):
        together = adapted(0, 64, slot, PROMPT_SEGMENT_ROWS)
        assert (together - product).abs().max() > 0.1
        # So many segments that programs would not share one.
        assert torch.equal(adapted(9, 3, slot, PROMPT_SEGMENT_ROWS, num_empty=600), together[9:12])
        for first, count in ((0, 1), (40, 1), (3, 2), (20, 16), (10, 35)):
            for segment in (SEGMENT_ROWS, PROMPT_SEGMENT_ROWS):
                found = adapted(first, count, slot, segment)
                assert torch.equal(found, together[first : first + count]), (slot, first, count, segment)
