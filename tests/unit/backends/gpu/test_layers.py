"""Products of a few rows, norms and gates against the modules they stand for."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte.model.mlp import GATES as GATE_FUNCTIONS
from stellarbyte.ops.triton.fp8 import product, quantize_rows, takes_fp8
from stellarbyte.ops.triton.gates import GATES, apply_gate, finish_logits
from stellarbyte.ops.triton.linear import MAX_ROWS, linear
from stellarbyte.ops.triton.lora import Addend
from stellarbyte.ops.triton.norm import add_branch, add_norm
from stellarbyte.ops.triton.paged import HeadShape
from stellarbyte.ops.triton.rotate_write import norm_projections
from stellarbyte.ops.triton.weights import Weight, dequantized, quantize
from tests.support.cases import SLOW_WITHOUT_GPU, each_value_once

EPS = 1e-5


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def random(*shape: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize(
    ("num_rows", "sizes", "parts"),
    each_value_once(
        [1, 2, 5, 16], [(48, 64), (37, 100), (5, 1500)],
        [("norm", "bias", "residual", "scale"), ("norm",), ("bias", "residual"), ()], mark=SLOW_WITHOUT_GPU,
    ),
    ids=str,
)  # fmt: skip
def test_a_product_with_what_stands_around_it(
    num_rows: int, sizes: tuple[int, int], parts: tuple[str, ...], device: torch.device
) -> None:
    num_outputs, num_inputs = sizes
    has_norm = "norm" in parts and num_rows == 1  # several rows are normed by another kernel
    x, matrix = random(num_rows, num_inputs, device=device), random(num_outputs, num_inputs, device=device, seed=1)
    norm, bias = random(num_inputs, device=device, seed=2), random(num_outputs, device=device, seed=3)
    residual, scale = random(num_rows, num_outputs, device=device, seed=4), random(num_outputs, device=device, seed=5)
    expected = (rms_norm(x, norm) if has_norm else x) @ matrix.T
    expected = expected + bias if "bias" in parts else expected
    expected = expected * scale if "scale" in parts else expected
    expected = expected + residual if "residual" in parts else expected
    found = linear(
        x,
        Weight(matrix_NK=matrix, bias_N=bias if "bias" in parts else None),
        norm_K=norm if has_norm else None,
        eps=EPS,
        residual_TN=residual if "residual" in parts else None,
        branch_scale_N=scale if "scale" in parts else None,
    )
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("gate", "num_rows", "has_bias"), each_value_once(list(GATES), [1, 3], [True, False], mark=SLOW_WITHOUT_GPU)
)
def test_a_gated_product(gate: str, num_rows: int, has_bias: bool, device: torch.device) -> None:
    x, matrix = random(num_rows, 72, device=device), random(2 * 40, 72, device=device, seed=1)
    norm, bias = random(72, device=device, seed=2), random(80, device=device, seed=3) if has_bias else None
    has_norm = num_rows == 1
    gates, ups = F.linear(rms_norm(x, norm) if has_norm else x, matrix, bias).chunk(2, dim=-1)
    weight = Weight(matrix_NK=matrix, bias_N=bias)
    found = linear(x, weight, norm_K=norm if has_norm else None, eps=EPS, gate=GATES[gate])
    torch.testing.assert_close(found, GATE_FUNCTIONS[gate](gates) * ups, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_a_gate(gate: str, device: torch.device) -> None:
    gate_up = 3 * random(7, 2 * 1100, device=device)
    gates, ups = gate_up.chunk(2, dim=-1)
    torch.testing.assert_close(
        apply_gate(gate_up, GATES[gate]), GATE_FUNCTIONS[gate](gates) * ups, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("options", [{}, {"scale": True}, {"alpha": 1.7}, {"alpha": 1.7, "scale": True}], ids=str)
def test_adding_a_branch_and_the_norm_of_the_sum(options: dict[str, Any], device: torch.device) -> None:
    x, branch, norm = (random(5, 48, device=device, seed=i) for i in range(3))
    scale = random(48, device=device, seed=3) if "scale" in options else None
    alpha = options.get("alpha")
    total = (alpha or 1.0) * x + branch * (1 if scale is None else scale)
    expected = rms_norm(total, norm[0])
    found = add_norm(x, branch, norm[0], EPS, branch_scale_C=scale, alpha=alpha)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x, expected if alpha is not None else total, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_terms", [1, 3])
def test_a_branch_of_several_terms_for_each_row(num_terms: int, device: torch.device) -> None:
    x, norm = random(5, 48, device=device), random(48, device=device, seed=1)
    branch, counts = random(5 * num_terms, 48, device=device, seed=2), torch.arange(7, dtype=torch.int32, device=device)
    expected = x + branch.view(5, num_terms, 48).sum(dim=1)
    sum_only = x.clone()
    add_branch(sum_only, branch, None)
    torch.testing.assert_close(sum_only, expected, atol=1e-5, rtol=1e-5)
    found = add_norm(x, branch, norm, EPS, counts_E=counts)
    torch.testing.assert_close(found, rms_norm(expected, norm), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)
    assert not counts.any()


@pytest.mark.parametrize("has_scale", [False, True])
def test_the_norm_of_a_branch_comes_before_its_scale(has_scale: bool, device: torch.device) -> None:
    x, branch = random(5, 48, device=device), random(5, 48, device=device, seed=1)
    norm, branch_norm, scale = random(3, 48, device=device, seed=2)
    added, delta = addend(5, 48, device)
    expected = x + rms_norm(branch + delta, branch_norm) * (scale if has_scale else 1)
    sum_only = x.clone()
    options = {"branch_norm_C": branch_norm, "addend": added}
    add_branch(sum_only, branch, scale if has_scale else None, eps=EPS, **options)
    torch.testing.assert_close(sum_only, expected, atol=1e-5, rtol=1e-5)
    found = add_norm(x, branch, norm, EPS, branch_scale_C=scale if has_scale else None, **options)
    torch.testing.assert_close(found, rms_norm(expected, norm), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("has_addend", [False, True])
def test_norms_over_all_heads_of_q_and_of_k(has_addend: bool, device: torch.device) -> None:
    heads = HeadShape(num_heads=6, num_kv_heads=2, head_dim=16)
    qkv, weights = random(5, 160, device=device), random(128, device=device, seed=1)
    added, delta = addend(5, 160, device)
    q, k, v = (qkv + (delta if has_addend else 0)).split([96, 32, 32], dim=1)
    expected = torch.cat([rms_norm(q, weights[:96]), rms_norm(k, weights[96:]), v], dim=1)
    norm_projections(qkv, weights, heads, EPS, added if has_addend else None)
    torch.testing.assert_close(qkv, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.5])
def test_the_factor_and_the_cap_of_logits(softcap: float | None, device: torch.device) -> None:
    logits = 4 * random(3, 700, device=device)
    expected = 0.3 * logits if softcap is None else softcap * torch.tanh(0.3 * logits / softcap)
    finish_logits(logits, 0.3, softcap)
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)


def addend(num_rows: int, width: int, device: torch.device) -> tuple[Addend, torch.Tensor]:
    """One for every other row, NaN in the rest; and the same with zeros there."""
    scales = torch.tensor([0.0, 0.5] * num_rows, device=device)[:num_rows]
    delta = random(num_rows, width, device=device, seed=9)
    return Addend(delta.where(scales[:, None] != 0, torch.nan), scales), delta * (scales[:, None] != 0)


@pytest.mark.parametrize("alpha", [None, 1.7])
def test_what_adapters_add_to_a_branch_is_added_in_their_rows_only(alpha: float | None, device: torch.device) -> None:
    x, branch, norm = (random(5, 48, device=device, seed=i) for i in range(3))
    added, delta = addend(5, 48, device)
    expected = (alpha or 1.0) * x + branch + delta
    sum_only = x.clone()
    add_branch(sum_only, branch, None, alpha, added)
    torch.testing.assert_close(sum_only, expected, atol=1e-5, rtol=1e-5)
    found = add_norm(x, branch, norm[0], EPS, alpha=alpha, addend=added)
    torch.testing.assert_close(found, rms_norm(expected, norm[0]), atol=1e-5, rtol=1e-5)


def test_what_adapters_add_goes_into_a_gate(device: torch.device) -> None:
    gate_up = random(5, 2 * 1100, device=device)
    added, delta = addend(5, 2 * 1100, device)
    gates, ups = (gate_up + delta).chunk(2, dim=-1)
    found = apply_gate(gate_up, GATES["silu"], added)
    torch.testing.assert_close(found, F.silu(gates) * ups, atol=1e-5, rtol=1e-5)


def test_a_norm_alone_and_a_branch_alone(device: torch.device) -> None:
    x, branch = random(3, 33, device=device), random(3, 33, device=device, seed=1)
    kept = x.clone()
    torch.testing.assert_close(add_norm(x, None, branch[0], EPS), rms_norm(kept, branch[0]), atol=1e-5, rtol=1e-5)
    assert torch.equal(x, kept)
    add_branch(x, branch, None, 2.0)
    torch.testing.assert_close(x, 2 * kept + branch)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
@pytest.mark.parametrize("num_rows", [1, 3, 20, MAX_ROWS])
def test_a_product_with_quantized_weights(quantization: str, num_rows: int, device: torch.device) -> None:
    if quantization == "fp8" and device.type == "cpu":
        pytest.skip("Triton's interpreter has no arithmetic for fp8 numbers")
    x, matrix = random(num_rows, 72, device=device), random(40, 72, device=device, seed=1)
    matrix[3] = 0
    weight = quantize(Weight(matrix_NK=matrix, bias_N=random(40, device=device, seed=2)), quantization)
    expected = F.linear(x, dequantized(weight, torch.float32), weight.bias_N)
    torch.testing.assert_close(linear(x, weight), expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 17, 300])
def test_a_product_of_rows_and_weights_in_fp8(num_rows: int, device: torch.device) -> None:
    """Near the product of the same rounded numbers in float32; and near that of the numbers that were rounded."""
    x = random(num_rows, 96, device=device).bfloat16() * torch.logspace(-3, 3, num_rows, device=device)[:, None]
    x[num_rows // 2] = 0
    matrix = random(48, 96, device=device, seed=1).bfloat16()
    weight = quantize(Weight(matrix_NK=matrix, bias_N=random(48, device=device, seed=2).bfloat16()), "fp8")
    if not takes_fp8(x.bfloat16(), weight):
        pytest.skip("needs a GPU with fp8 matrix units")
    x = x.bfloat16()
    rows, scales = quantize_rows(x)
    rounded = rows.float() * scales
    assert ((rounded - x.float()).abs() <= x.float().abs() * 2**-4 + x.float().abs().amax(1, keepdim=True) * 2e-5).all()
    expected = F.linear(rounded, dequantized(weight, torch.float32), weight.bias_N.float())
    error = (product(x, weight).float() - expected).abs()
    assert (error <= 2**-8 * (rounded.norm(dim=1) * matrix.float().norm(dim=1, keepdim=True)).T + 0.02).all()


@pytest.mark.parametrize(("quantization", "largest_error"), [("int8", 0.5 / 127), ("fp8", 2**-4)])
def test_quantized_weights_are_near_the_weights(quantization: str, largest_error: float) -> None:
    matrix = torch.randn(40, 72, generator=torch.Generator().manual_seed(0))
    found = dequantized(quantize(Weight(matrix_NK=matrix), quantization), torch.float32)
    largest = matrix.abs().amax(dim=1, keepdim=True)
    allowed = largest * largest_error if quantization == "int8" else matrix.abs() * largest_error + largest * 2**-16
    assert ((found - matrix).abs() <= allowed * 1.01).all()
