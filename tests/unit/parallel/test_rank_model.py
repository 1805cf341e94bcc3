"""The models of all ranks together compute the model: log-probabilities as the oracle's, tokens as one engine's."""

from functools import partial

import pytest
import torch

from tests.support.cases import each_value_once
from tests.support.engines.engine import ModelEngine, make_request
from tests.support.engines.ranks import RanksInThreads
from tests.support.models import oracle
from tests.support.models.adapters import merged, random_adapter
from tests.support.models.byte_transformer import EXPERT_VARIANTS, VARIANTS, make_model, random_tokens

UNEVEN = {"num_attention_heads": 6, "num_key_value_heads": 3}
CASES = VARIANTS | EXPERT_VARIANTS


@pytest.mark.parametrize(("ranks", "variant"), each_value_once([2, 4], list(CASES)))
def test_log_probabilities_are_the_oracles(ranks: int, variant: str) -> None:
    """With 4 ranks, each key-value head is on two of them. Positions go beyond the windows."""
    model = make_model(**CASES[variant])
    tokens = random_tokens(40)
    expected = oracle.logprobs(model.state_dict(), model.config, tokens)
    backend = partial(RanksInThreads, ranks=ranks)
    engine = ModelEngine(model, backend=backend, max_num_batched_tokens=11, num_blocks=40)
    assert (engine.teacher_forced(tokens, 33) - expected[32:]).abs().max() <= 1e-4


@pytest.mark.parametrize("variant", ["xpos window sinks", "experts", "norms after"])
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_heads_that_are_no_multiple_of_the_ranks(variant: str, ranks: int) -> None:
    model = make_model(**CASES[variant] | UNEVEN)
    tokens = random_tokens(30)
    expected = oracle.logprobs(model.state_dict(), model.config, tokens)
    engine = ModelEngine(model, backend=partial(RanksInThreads, ranks=ranks), num_blocks=40)
    assert (engine.teacher_forced(tokens, 20) - expected[19:]).abs().max() <= 1e-4


def test_a_norm_over_all_heads_counts_each_head_once() -> None:
    """Of keys, too, of whose heads there are two copies."""
    model = make_model(**VARIANTS["norms after"])
    tokens = random_tokens(12)
    expected = oracle.logprobs(model.state_dict(), model.config, tokens)
    engine = ModelEngine(model, backend=partial(RanksInThreads, ranks=4))
    assert (engine.teacher_forced(tokens, 10) - expected[9:]).abs().max() <= 1e-4


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("variant", ["llama", "experts, shared with a gate, some layers dense"])
def test_adapters_are_cut_alike(ranks: int, variant: str) -> None:
    """With DoRA in some modules, a head and an embedding of their own, and a request's scale; biases stay unscaled."""
    model = make_model(**CASES[variant])
    adapter = random_adapter(model.config, 5, dora=0.5, replaced=("lm_head", "model.embed_tokens"), share=0.8)
    tokens = random_tokens(24)
    backend = partial(RanksInThreads, ranks=ranks)
    for scale in (1.0, 0.5):
        expected = oracle.logprobs(merged(model, adapter, scale).state_dict(), model.config, tokens)
        engine = ModelEngine(model, backend=backend, adapters={"a": adapter})
        actual = engine.teacher_forced(tokens, 8, adapter="a", adapter_scale=scale)
        assert (actual - expected[7:]).abs().max() <= 1e-4


def test_the_tokens_of_a_batch_are_those_of_one_rank() -> None:
    """Greedy and seeded, adapters and none, with a common prefix in the cache, and with preemptions."""
    model = make_model()
    adapters = {"a": random_adapter(model.config, 1), "b": random_adapter(model.config, 2)}
    prefix = random_tokens(16, seed=9)
    requests = [
        make_request(
            [*prefix, *random_tokens(3 + i, seed=i)],
            24,
            request_id=str(i),
            seed=i,
            temperature=0.9 * (i % 2),
            repetition_penalty=1.1 if i % 3 == 0 else 1.0,
            **({"adapter": "ab"[i % 2], "adapter_scale": 0.5 + i} if i % 3 else {}),
        )
        for i in range(6)
    ]
    told = []
    for backend in (None, partial(RanksInThreads, ranks=2)):
        options = {} if backend is None else {"backend": backend}
        engine = ModelEngine(model, adapters=adapters, num_blocks=30, max_num_batched_tokens=32, **options)
        told.append([*engine.generate(requests), *engine.generate(requests)])
        assert engine.scheduler.totals.num_preemptions > 0
        assert engine.scheduler.totals.prefix_hits > 0
    assert told[0] == told[1]


def test_a_rank_has_memory_for_its_share_alone() -> None:
    model = make_model(num_key_value_heads=4, vocab_size=96)
    ranks = RanksInThreads(model, model.config, ModelEngine(model)._bank, ranks=4)
    for served in ranks.models:
        linears = [m.weight for m in served.model.modules() if isinstance(m, torch.nn.Linear)]
        whole = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
        assert sum(weight.numel() for weight in linears) * 4 == whole
        assert served.model.model.embed_tokens.weight.shape == (24, 48)
        assert served.model.lm_head.weight.shape == (24, 48)
