"""Choices and gates of the router against the float64 oracle; noise, dynamic k and its schedule."""

import math
from typing import Any

import pytest
import torch

from stellarbyte.model.moe.router import MOST_MAXIMA, Routing, best_experts, move_selection_bias
from tests.support.models import expert_oracle
from tests.support.models.byte_transformer import make_config
from tests.support.models.routers import NUM_EXPERTS, NUM_TOKENS, hidden_states, make_router


def chosen(routing: Routing) -> list[list[int]]:
    return [[e for e in row if e < NUM_EXPERTS] for row in routing.experts_TK.tolist()]


OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "not renormalised": {"norm_topk_prob": False},
    "sigmoid": {"router_score": "sigmoid"},
    "biases": {"router_score": "sigmoid", "router_bias": True, "router_selection_bias": True},
    "selection bias": {"router_selection_bias": True, "norm_topk_prob": False},
    "share": {"router_top_p": 0.75, "num_experts_per_tok": NUM_EXPERTS},
    "share within bounds": {"router_top_p": 0.6, "num_experts_per_tok": 4, "min_experts_per_tok": 2},
    "share of sigmoids": {"router_top_p": 0.5, "num_experts_per_tok": NUM_EXPERTS, "router_score": "sigmoid"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_choices_and_gates_are_those_of_the_oracle(name: str, dtype: torch.dtype) -> None:
    """Of bfloat16 weights and hidden states, too: the router computes in float32."""
    router = make_router(dtype, **OPTIONS[name])
    config = make_config(**({"num_experts": NUM_EXPERTS, "num_experts_per_tok": 3} | OPTIONS[name]))
    x_TC = hidden_states().to(dtype)
    routing = router(x_TC)
    w = {f"mlp.gate.{name}": parameter.detach().double() for name, parameter in router.named_parameters()}
    bias = w.get("mlp.gate.e_score_correction_bias", torch.zeros(NUM_EXPERTS)).tolist()
    sizes = set()
    for t, x in enumerate(x_TC.double()):
        scores = expert_oracle.scores_of(expert_oracle.router_logits(w, x), config.router_score)
        expected = expert_oracle.chosen_experts(scores, bias, config)
        assert chosen(routing)[t] == expected
        total = sum(scores[e] for e in expected) if config.norm_topk_prob else 1.0
        gates = torch.tensor(
            [scores[e] / total for e in expected] + [0.0] * (routing.gates_TK.shape[1] - len(expected))
        )
        torch.testing.assert_close(routing.gates_TK[t], gates, atol=1e-6, rtol=1e-5)
        sizes.add(len(expected))
    assert routing.num_pairs == sum(map(len, chosen(routing))) and routing.gates_TK.dtype == torch.float32
    assert len(sizes) > 1 or config.router_top_p is None


def test_autocast_does_not_reach_the_router() -> None:
    router = make_router()
    expected = router(hidden_states())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = router(hidden_states())
    assert torch.equal(found.gates_TK, expected.gates_TK)


def test_ties_go_to_the_lower_numbers() -> None:
    router = make_router()
    torch.nn.init.zeros_(router.weight)
    assert router(hidden_states()).experts_TK.tolist() == [[0, 1, 2]] * NUM_TOKENS


@pytest.mark.parametrize("k", [1, 2, MOST_MAXIMA, MOST_MAXIMA + 1, 20])
def test_the_best_of_many_equal_scores_are_the_oracles(k: int) -> None:
    preference_TE = torch.randint(4, (50, 20), generator=torch.Generator().manual_seed(k)) / 4
    expected = [expert_oracle.ranking(scores, [0.0] * 20)[:k] for scores in preference_TE.tolist()]
    assert best_experts(preference_TE, k).tolist() == expected


def test_a_softmax_over_the_chosen_logits_is_the_same_gates() -> None:
    router = make_router()
    best = (hidden_states() @ router.weight.T).topk(3)
    routing = router(hidden_states())
    assert torch.equal(routing.experts_TK, best.indices)
    torch.testing.assert_close(routing.gates_TK, best.values.softmax(-1), atol=1e-6, rtol=0)


def test_the_whole_share_is_a_dense_mixture() -> None:
    router = make_router(router_top_p=1.0, num_experts_per_tok=NUM_EXPERTS)
    router.weight.data *= 30  # scores that float32 rounds to 0 beside 1 count as well
    routing = router(hidden_states())
    dense_TE = torch.zeros(NUM_TOKENS, NUM_EXPERTS).scatter(1, routing.experts_TK, routing.gates_TK)
    assert routing.num_pairs == NUM_TOKENS * NUM_EXPERTS
    torch.testing.assert_close(dense_TE, (hidden_states() @ router.weight.T).softmax(-1), atol=1e-6, rtol=0)


def test_the_share_grows_linearly_in_training() -> None:
    router = make_router(
        router_top_p=0.9, num_experts_per_tok=NUM_EXPERTS, router_top_p_start=0.3, router_top_p_steps=100
    ).train()

    def most_without_last() -> float:
        """The largest share that a token's choices but the last one have: just below p, with many tokens."""
        routing = router(hidden_states(4000))
        shares_TK = routing.scores_TE.sort(dim=1, descending=True).values
        kept = (routing.experts_TK < NUM_EXPERTS).sum(dim=1, keepdim=True)
        return float((shares_TK.cumsum(1) - shares_TK).gather(1, kept - 1).max())

    for step, share in ((0, 0.3), (50, 0.6), (100, 0.9), (1000, 0.9)):
        router.step = step
        assert share - 0.05 < most_without_last() < share
    router.step = 0
    router.eval()
    assert 0.85 < most_without_last() < 0.9


@pytest.mark.parametrize("noise", ["noisy_top_k", "gumbel"])
def test_noise_acts_in_training_only_and_noise_0_is_top_k(noise: str) -> None:
    plain = make_router()(hidden_states())
    router = make_router(router_noise=noise)
    router.weight.data.copy_(make_router().weight)
    assert torch.equal(router(hidden_states()).experts_TK, plain.experts_TK)
    assert not torch.equal(router.train()(hidden_states()).experts_TK, plain.experts_TK)
    silent = make_router(router_noise=noise, router_noise_scale=0).train()
    silent.weight.data.copy_(make_router().weight)
    found = silent(hidden_states())
    assert torch.equal(found.experts_TK, plain.experts_TK) and torch.equal(found.gates_TK, plain.gates_TK)


def test_noise_has_its_distribution() -> None:
    """Normal with softplus(W x) as its deviation, and Gumbel's, of mean 0.577 and variance π² / 6."""
    router = make_router(router_noise="noisy_top_k", router_noise_scale=0.5).train()
    x_TC = hidden_states(1).expand(50_000, -1)
    routing = router(x_TC)
    assert routing.noisy_logits_TE is not None and router.noise_weight is not None
    noise_TE = routing.noisy_logits_TE - routing.logits_TE
    deviation_E = 0.5 * torch.nn.functional.softplus(router.noise_weight @ x_TC[0])
    torch.testing.assert_close(noise_TE.std(dim=0), deviation_E, atol=0, rtol=0.03)
    assert (noise_TE.mean(dim=0) / deviation_E).abs().max() < 0.03
    gumbel = make_router(router_noise="gumbel", router_score="sigmoid").train()
    routing = gumbel(x_TC)
    noise_TE = routing.scores_TE.double().logit() - routing.logits_TE
    torch.testing.assert_close(noise_TE.mean(dim=0), torch.full((NUM_EXPERTS,), 0.5772).double(), atol=0.03, rtol=0)
    torch.testing.assert_close(
        noise_TE.var(dim=0), torch.full((NUM_EXPERTS,), math.pi**2 / 6).double(), atol=0, rtol=0.05
    )


def test_the_selection_bias_moves_towards_an_even_load() -> None:
    bias_E = torch.tensor([0.5, 0.0, -0.5, 0.0])
    move_selection_bias(bias_E, torch.tensor([0.9, 0.5, 0.1, 0.5]), rate=0.1)
    torch.testing.assert_close(bias_E, torch.tensor([0.4, 0.0, -0.4, 0.0]))
