"""Rows times the matrices of their own experts: products of their own and the grouped kernel, with gradients."""

from functools import partial
from typing import Any

import pytest
import torch

from stellarbyte.model.attention import plain_projection
from stellarbyte.model.moe import experts as experts_module
from stellarbyte.model.moe.layer import ByteMoE
from stellarbyte.model.moe.products import (
    MANY_ROWS,
    grouped_linear,
    linear_of_groups,
    outer_of_groups,
    product_dtype,
    takes_grouped,
)
from tests.support.models.byte_transformer import EXPERT_VARIANTS, make_config, make_model, random_tokens
from tests.support.models.routers import make_experts


def random_operands(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Five rows of 6 inputs, four matrices of 3 outputs, and the rows of each."""
    torch.manual_seed(0)
    x_NK = torch.randn(5, 6, dtype=dtype, requires_grad=True)
    weight_EOK = torch.randn(4, 3, 6, dtype=dtype, requires_grad=True)
    return x_NK, weight_EOK, torch.tensor([3, 0, 1, 1])


@pytest.mark.parametrize("is_transposed", [False, True])
@torch.no_grad()
def test_each_row_meets_its_own_experts_matrix(is_transposed: bool) -> None:
    x_NK, weight_EOK, counts_E = random_operands()
    given_EOK = weight_EOK.transpose(1, 2).contiguous().transpose(1, 2) if is_transposed else weight_EOK
    found_NO = grouped_linear(x_NK, given_EOK, counts_E, in_one_kernel=False)
    for row, expert in enumerate((0, 0, 0, 2, 3)):
        torch.testing.assert_close(found_NO[row], weight_EOK[expert] @ x_NK[row])


def test_gradients_of_grouped_products_are_those_of_finite_differences() -> None:
    x_NK, weight_EOK, counts_E = random_operands()
    product = partial(grouped_linear, counts_E=counts_E, in_one_kernel=False)
    assert torch.autograd.gradcheck(product, (x_NK, weight_EOK))
    frozen_EOK = weight_EOK.detach()  # as a base under adapters
    assert torch.autograd.gradcheck(lambda x: product(x, frozen_EOK), (x_NK,))


def test_the_operators_keep_torchs_rules() -> None:
    """Shapes that a compiler asks for, gradients, no aliases."""
    x_NK, weight_EOK, counts_E = random_operands()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(linear_of_groups, (x_NK, weight_EOK, counts_E), test_utils=checks)
    y_NO = torch.randn(5, 3, dtype=torch.float64)
    torch.library.opcheck(outer_of_groups, (y_NO, x_NK.detach(), counts_E), test_utils=checks)


def test_autocast_reaches_both_factors() -> None:
    x_NK, weight_EOK, counts_E = random_operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found_NO = grouped_linear(x_NK, weight_EOK, counts_E, in_one_kernel=False)
    found_NO.sum().backward()
    assert found_NO.dtype == torch.bfloat16 and x_NK.grad is not None and x_NK.grad.dtype == torch.float32
    rounded = [operand.bfloat16().double() for operand in (x_NK.detach(), weight_EOK.detach())]
    expected_NO = grouped_linear(*rounded, counts_E, in_one_kernel=False)
    torch.testing.assert_close(found_NO.double(), expected_NO, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 0, 0, 8], [8, 0, 0, 0], [1, 2, 2, 3]])
def test_the_grouped_kernel_computes_what_the_loop_computes(
    counts: list[int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients, in bfloat16; `F.grouped_mm` has an implementation for CPUs as well."""
    torch.manual_seed(0)
    results = []
    for grouped in (False, True):
        monkeypatch.setattr(experts_module, "takes_grouped", lambda *_, grouped=grouped: grouped)
        torch.manual_seed(1)
        experts = make_experts(4, torch.bfloat16).to(device)
        x_NC = torch.randn(8, 48, dtype=torch.bfloat16, device=device, requires_grad=True)
        out_NC = experts(x_NC, torch.tensor(counts, device=device))
        out_NC.float().square().sum().backward()
        results.append([out_NC.detach(), x_NC.grad, *(stack.grad for stack in experts.parameters())])
    for looped, grouped in zip(*results, strict=True):
        scale = float(looped.float().abs().max())
        torch.testing.assert_close(grouped.float(), looped.float(), atol=0.02 * scale, rtol=0.02)


def test_a_layer_is_one_compiled_graph_either_way(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fullgraph` raises where a graph ends, as it does at sizes that Python reads from a tensor."""
    torch.manual_seed(0)
    config = make_config(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, num_hidden_layers=1)
    layer, x_TC = ByteMoE(config, 0).to(device), torch.randn(30, 48, device=device, requires_grad=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)

    def results(compute: Any) -> list[torch.Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            out_TC, _ = compute(x_TC, plain_projection)
        return [out_TC.detach(), *torch.autograd.grad(out_TC.square().sum(), [x_TC, *layer.parameters()])]

    expected = results(layer)
    for grouped in (False, True):
        monkeypatch.setattr(experts_module, "takes_grouped", lambda *_, grouped=grouped: grouped)
        torch.compiler.reset()
        for found, plain in zip(
            results(torch.compile(layer, backend="aot_eager", fullgraph=True)), expected, strict=True
        ):
            torch.testing.assert_close(found, plain, atol=0.02 * float(plain.abs().max()), rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [False, True])
def test_a_model_in_autocast_is_one_compiled_graph(
    grouped: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are in float32 there, and so are their gradients."""
    monkeypatch.setattr(experts_module, "takes_grouped", lambda *_: grouped)
    results = []
    for is_compiled in (False, True):
        torch.manual_seed(1)
        model = make_model(**EXPERT_VARIANTS["experts, shared with a gate, some layers dense"]).to(device).train()
        tokens = torch.tensor([random_tokens(30)], device=device)
        compute = torch.compile(model, backend="aot_eager", fullgraph=True) if is_compiled else model
        with torch.autocast(device.type, torch.bfloat16):
            loss = compute(tokens, labels=tokens, skip_logits=True).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for plain, found in zip(*results, strict=True):
        assert found.dtype == torch.float32
        scale = float(plain.abs().max())
        torch.testing.assert_close(found, plain, atol=0.05 * scale, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_have_the_dtype_of_linear_layers(dtype: torch.dtype) -> None:
    x, matrix = torch.zeros(2, 3, dtype=dtype), torch.zeros(4, 3, dtype=dtype)
    for is_on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            assert product_dtype(x) == torch.nn.functional.linear(x, matrix).dtype


def test_only_bfloat16_on_a_gpu_takes_the_grouped_kernel() -> None:
    x_NK, weight_EOK = torch.zeros(4, 8), torch.zeros(2, 8, 8)
    assert not takes_grouped(x_NK, weight_EOK) and not takes_grouped(x_NK.bfloat16(), weight_EOK.bfloat16())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
def test_few_rows_in_autocast_on_a_gpu_take_the_grouped_kernel() -> None:
    x_NK, weight_EOK = torch.zeros(4, 8, device="cuda"), torch.zeros(2, 8, 8, device="cuda")
    assert not takes_grouped(x_NK, weight_EOK)
    with torch.autocast("cuda", torch.bfloat16):
        assert takes_grouped(x_NK, weight_EOK)
        assert not takes_grouped(x_NK.new_zeros(2 * MANY_ROWS, 8), weight_EOK)
        assert not takes_grouped(x_NK, weight_EOK, torch.zeros(2, 8, 9, device="cuda"))
