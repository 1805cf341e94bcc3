"""Factors folded into what comes before: the model computes the same, and inputs that take none are named."""

import copy
from typing import Any

import pytest
import torch

from stellarbyte.compress.quantization.folding import folds
from stellarbyte.compress.quantization.grid import Grid
from stellarbyte.compress.quantization.scaling import awq_factors, smoothquant_factors
from stellarbyte.compress.quantization.statistics import InputStatistics, product_errors
from tests.support.models.byte_transformer import EXPERT_VARIANTS, VARIANTS, make_model, random_tokens

ALL = {"attention_input", "attended", "mlp_input", "gated"}
FOLDABLE: dict[str, set[str]] = {
    **dict.fromkeys(VARIANTS, ALL),
    "parallel": ALL - {"mlp_input"},  # part of attention_input
    "norms after": {"attended", "gated"},
    "deepnorm": {"attended", "gated"},
    "deepnorm parallel": {"attended", "gated"},
}


@torch.no_grad()
def logprobs(model: Any) -> torch.Tensor:
    return model(torch.tensor([random_tokens(40)])).logits.double().log_softmax(dim=-1)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_logits_stay(name: str) -> None:
    model = make_model(**VARIANTS[name])
    folded = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for layer in folded.model.layers:
        found, left_out = folds(layer, model.config)
        assert {fold.name for fold in found} == FOLDABLE[name]
        expected = set() if model.config.parallel_residual and "mlp_input" not in left_out else {"mlp_input"}
        assert left_out.keys() == (ALL - FOLDABLE[name]) - ({"mlp_input"} - expected)
        for fold in found:
            before = fold.linears[0].weight.clone()
            factors = fold.tie(torch.rand(before.shape[1], generator=generator) * 3 + 0.2)
            fold.apply(factors)
            torch.testing.assert_close(fold.linears[0].weight, before * factors)
    torch.testing.assert_close(logprobs(folded), logprobs(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["experts, shared with a gate, some layers dense", "experts, parallel, norms over all heads"]
)
def test_inputs_of_routers_take_no_factors(name: str) -> None:
    model = make_model(**EXPERT_VARIANTS[name])
    has_experts = [owner is not None for owner in model.config.expert_layers]
    for layer, is_mixture in zip(model.model.layers, has_experts, strict=True):
        _, left_out = folds(layer, model.config)
        assert ("mlp_input" in left_out) is is_mixture
        if is_mixture:
            assert "routers and experts read it" in left_out["mlp_input"]


def test_awq_takes_the_best_of_its_factors_and_smoothquant_its_formula() -> None:
    model = make_model(hidden_size=64, intermediate_size=96, use_xpos=False)
    fold = next(fold for fold in folds(model.model.layers[0], model.config)[0] if fold.name == "mlp_input")
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1.5, 1.5, 64)
    inputs, grid = InputStatistics(64), Grid(kind="int4")
    inputs.add(x)
    weight = torch.cat([linear.weight.data for linear in fold.linears])

    def error(factors: torch.Tensor) -> float:
        scaled = weight * factors
        return float(product_errors(weight - grid.round(scaled, grid.fit(scaled)) / factors, inputs.gram_KK).sum())

    found = awq_factors(fold, inputs, grid)
    assert error(found) < 0.8 * error(torch.ones(64))
    for exponent in (0.25, 0.5, 0.75):
        assert error(found) <= error(x.abs().mean(dim=0) ** exponent) * (1 + 1e-5)
    expected = x.abs().amax(dim=0) ** 0.7 / weight.abs().amax(dim=0) ** 0.3
    torch.testing.assert_close(smoothquant_factors(fold, inputs, 0.7), expected)


def test_statistics_of_divided_inputs_are_those_of_the_inputs_divided() -> None:
    x, factors = torch.randn(50, 32), torch.rand(32) + 0.5
    divided, expected = InputStatistics(32), InputStatistics(32)
    divided.add(x)
    divided.divide(factors)
    expected.add(x / factors)
    torch.testing.assert_close(divided.gram_KK, expected.gram_KK, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(divided.mean_K, expected.mean_K)
    torch.testing.assert_close(divided.largest_K, expected.largest_K)
