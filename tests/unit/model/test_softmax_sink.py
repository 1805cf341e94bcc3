"""Sinks of the softmax: their gradients, and logits far from those of the keys, on every path that attends."""

import pytest
import torch

from stellarbyte.model.dense_attention import sdpa
from tests.support.engines.engine import BACKENDS, Backend, ModelEngine
from tests.support.models import oracle
from tests.support.models.byte_transformer import W, make_model, random_tokens

OPTIONS = {
    "softmax_sink": True,
    "use_xpos": False,
    "sliding_window": W,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
}
SINK = "model.layers.1.self_attn.softmax_sink"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gradients_are_those_of_the_oracle(implementation: str) -> None:
    model = make_model(attn_implementation=implementation, **OPTIONS)
    tokens = random_tokens(2 * W)
    model(torch.tensor([tokens]), labels=torch.tensor([tokens])).loss.backward()
    weights = {name: tensor.double().requires_grad_() for name, tensor in model.state_dict().items()}
    logprobs = oracle.logprobs(weights, model.config, tokens)
    (-logprobs[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).mean()).backward()
    for name in (SINK, "model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        expected, found = weights[name].grad, model.get_parameter(name).grad
        assert expected is not None and found is not None and expected.abs().max() > 1e-3
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("logit", [-200.0, 200.0])
@torch.no_grad()
def test_logits_far_from_all_scores_leave_every_number_finite(logit: float, backend: Backend) -> None:
    """One sink of each layer hides all keys or none; the other heads go on as before."""
    model = make_model(**OPTIONS)
    for layer in model.model.layers:
        layer.self_attn.softmax_sink[2] = logit
    tokens = random_tokens(3 * W)
    expected = oracle.logprobs(model.state_dict(), model.config, tokens)
    found = model(torch.tensor([tokens])).logits[0].double().log_softmax(dim=-1)
    assert (found - expected).abs().max() <= 1e-4
    served = ModelEngine(model, backend=backend, max_num_batched_tokens=20).teacher_forced(tokens, 10)
    assert (served - expected[9:]).abs().max() <= 1e-4


def test_bfloat16_does_not_round_a_sink() -> None:
    """Two keys of a score of 50 and a sink of 50.3, whose product before the scale of 1/8 has 9 bits."""
    q, k, v = torch.full((1, 1, 1, 64), 2.5), torch.full((1, 2, 1, 64), 2.5), torch.ones(1, 2, 1, 64)
    out = sdpa(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, 1 / 8, 0.0, sink_BH=torch.tensor([[50.3]]))
    expected = 2 / (2 + torch.tensor(0.3).exp())
    torch.testing.assert_close(out.float(), expected.expand(1, 1, 1, 64), rtol=2**-8, atol=0)
