"""Every token gets its experts' outputs, and with a capacity what a float64 loop over tokens and experts says."""

import math
import random
from typing import Any

import pytest
import torch

from stellarbyte.model.attention import plain_projection
from stellarbyte.model.moe.dispatch import dispatch, within_capacity
from stellarbyte.model.moe.layer import ByteMoE
from stellarbyte.model.moe.router import Routing
from tests.support.models import expert_oracle
from tests.support.models.byte_transformer import make_config
from tests.support.models.routers import make_experts

HIDDEN = 48


def routing_of(scores_TE: torch.Tensor, num_chosen: list[int], most: int, *, renormalised: bool = False) -> Routing:
    """A routing by random scores in which token t chooses num_chosen[t] experts."""
    num_experts = scores_TE.shape[1]
    ranking_TE = scores_TE.sort(dim=1, descending=True, stable=True).indices
    is_chosen_TK = torch.arange(most) < torch.tensor(num_chosen)[:, None]
    gates_TK = scores_TE.gather(1, ranking_TE)[:, :most].masked_fill(~is_chosen_TK, 0)
    if renormalised:
        gates_TK = gates_TK / gates_TK.sum(dim=1, keepdim=True).clamp(min=1e-30)
    return Routing(
        experts_TK=ranking_TE[:, :most].masked_fill(~is_chosen_TK, num_experts),
        gates_TK=gates_TK,
        num_pairs=sum(num_chosen),
        preference_TE=scores_TE,
        scores_TE=scores_TE,
        logits_TE=scores_TE.log(),
        noisy_logits_TE=None,
        noise_scale_TE=None,
    )


@pytest.mark.parametrize(
    ("tokens", "num_experts", "most"), [(1, 4, 2), (3, 8, 8), (17, 5, 1), (200, 60, 4), (40, 300, 3)]
)
@torch.no_grad()
def test_each_token_gets_the_weighted_sum_of_its_experts(tokens: int, num_experts: int, most: int) -> None:
    torch.manual_seed(tokens)
    experts = make_experts(num_experts, num_experts_per_tok=most, hidden_act="gelu")
    num_chosen = random.Random(tokens).choices(range(most + 1), k=tokens)
    routing = routing_of(torch.rand(tokens, num_experts), num_chosen, most)
    x_TC = torch.randn(tokens, HIDDEN)
    found_TC = dispatch(x_TC, routing, experts)
    config = make_config(hidden_act="gelu")
    w = {f"mlp.experts.{name}": stack.double() for name, stack in experts.named_parameters()}
    for t in range(tokens):
        expected = torch.zeros(HIDDEN, dtype=torch.float64)
        for e, gate in zip(routing.experts_TK[t].tolist(), routing.gates_TK[t].tolist(), strict=True):
            if e < num_experts:
                expected += gate * expert_oracle.expert(w, config, e, x_TC[t].double())
        torch.testing.assert_close(found_TC[t].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(40))
def test_capacity_priority_and_rerouting_are_those_of_a_loop(seed: int) -> None:
    chance = random.Random(seed)
    tokens, num_experts = chance.choice([1, 5, 23, 60]), chance.choice([3, 8, 13])
    most, factor = chance.randint(1, min(4, num_experts)), chance.choice([0.2, 0.5, 1.0, 1.25, 3.0])
    torch.manual_seed(seed)
    scores_TE = torch.randn(tokens, num_experts).add(torch.linspace(0, 3, num_experts)).softmax(dim=1)  # crowded ones
    if seed % 4 == 0:
        scores_TE = (scores_TE * 8).round() / 8  # ties
    num_chosen = [chance.randint(1, most) for _ in range(tokens)]
    is_token = [chance.random() < 0.8 for _ in range(tokens)]
    routing = routing_of(scores_TE, num_chosen, most, renormalised=seed % 2 == 0)
    wanted = [count if there else 0 for count, there in zip(num_chosen, is_token, strict=True)]
    room = math.ceil(factor * sum(wanted) / num_experts)
    rankings = [expert_oracle.ranking(scores, [0.0] * num_experts) for scores in scores_TE.tolist()]
    expected = expert_oracle.placed_experts(scores_TE.tolist(), rankings, wanted, room)

    found = within_capacity(routing, factor, torch.tensor(is_token))
    placed = [[e for e in row if e < num_experts] for row in found.experts_TK.tolist()]
    assert [sorted(row) for row in placed] == [sorted(row) for row in expected]
    assert found.num_pairs == sum(map(len, placed))
    for t, row in enumerate(found.experts_TK.tolist()):
        before, total = float(routing.gates_TK[t].sum()), float(scores_TE[t, expected[t]].sum())
        for e, gate in zip(row, found.gates_TK[t].tolist(), strict=True):
            share = 0.0 if e == num_experts else float(scores_TE[t, e]) / max(total, 1e-30)
            assert gate == pytest.approx(share * before, abs=1e-6)
        if total > 0:
            assert float(found.gates_TK[t].sum()) == pytest.approx(before, abs=1e-5)  # the sum is kept


def test_capacities_of_the_cases_are_exceeded() -> None:
    """A crowd that all want one expert: the others go to their next choices, the last ones nowhere."""
    scores_TE = torch.tensor([[0.9 - 0.1 * t, 0.1, 0.05] for t in range(5)])
    found = within_capacity(routing_of(scores_TE, [1] * 5, 1), 1.0)  # 2 tokens for each expert
    assert found.experts_TK.flatten().tolist() == [0, 0, 1, 1, 2]
    found = within_capacity(routing_of(scores_TE, [1] * 5, 1), 0.5)  # 1 token
    assert found.experts_TK.flatten().tolist() == [0, 1, 2, 3, 3]
    assert found.gates_TK[3:].sum() == 0


def test_enough_capacity_changes_nothing() -> None:
    routing = routing_of(torch.rand(30, 5), [2] * 30, 2)
    found = within_capacity(routing, 5.0)
    assert torch.equal(found.experts_TK, routing.experts_TK)
    torch.testing.assert_close(found.gates_TK, routing.gates_TK)


def make_layer(**options: Any) -> ByteMoE:
    torch.manual_seed(0)
    layer = ByteMoE(make_config(**({"num_experts": 8, "moe_intermediate_size": 24} | options)), 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


@torch.no_grad()
def test_a_token_without_an_expert_keeps_the_shared_expert_in_training_and_is_served_by_all() -> None:
    layer = make_layer(capacity_factor=0.1, shared_expert_intermediate_size=16).train()
    x_TC = torch.randn(20, HIDDEN)
    out_TC, _ = layer(x_TC, plain_projection)
    shared_TC = layer.shared_expert(x_TC, plain_projection)
    alone_T = torch.isclose(out_TC, shared_TC, atol=1e-6).all(dim=1)
    assert alone_T.sum() == 20 - 8  # an expert takes ⌈0.1 · 40 / 8⌉ = 1 token, each another one here
    served_TC, _ = layer.eval()(x_TC, plain_projection)
    dropless_TC, _ = make_layer(shared_expert_intermediate_size=16).eval()(x_TC, plain_projection)
    assert torch.equal(served_TC, dropless_TC)


@pytest.mark.parametrize("factor", [None, 1.0])
def test_gradients_reach_every_expert_that_got_a_token_and_no_other(factor: float | None) -> None:
    layer = make_layer(capacity_factor=factor, num_experts=16).train()
    x_TC = torch.randn(6, HIDDEN, requires_grad=True)
    routing = layer.gate(x_TC)
    if factor is not None:
        routing = within_capacity(routing, factor)
    out_TC, _ = layer(x_TC, plain_projection)
    out_TC.square().sum().backward()
    got = {e for e in routing.experts_TK.flatten().tolist() if e < 16}
    assert 1 < len(got) < 16
    for stack in (layer.experts.gate_up_proj, layer.experts.down_proj):
        assert {e for e in range(16) if stack.grad[e].abs().max() > 0} == got
    assert layer.gate.weight.grad.abs().max() > 0 and x_TC.grad.abs().min() > 0
