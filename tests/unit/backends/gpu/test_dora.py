"""Adapters with DoRA on the GPU engine against the float64 oracle; on a CPU by Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.support.engines.engine import ModelEngine, make_request
from tests.support.engines.gpu_engine import GpuEngine, own_stream
from tests.support.models import oracle
from tests.support.models.adapters import merged, random_adapter
from tests.support.models.byte_transformer import make_model, random_tokens

FIRST, LENGTH = 9, 12  # the prompt is one step, then each token
SIZES = {"num_hidden_layers": 1, "attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_logprobs_equal_the_oracles_on_changed_weights(scale: float, device: torch.device) -> None:
    """In prompts and when decoding; the step of a plain adapter after it has no change of the product."""
    model, tokens = make_model(**SIZES), random_tokens(LENGTH)
    adapters = {
        name: random_adapter(model.config, seed, ranks=(1, 4), share=0.8, dora=dora)
        for seed, (name, dora) in enumerate([("dora", 1.0), ("some", 0.5), ("plain", 0.0)])
    }
    with own_stream(device):
        engine = GpuEngine(model, device, adapters=adapters, num_blocks=20, max_num_seqs=2)
        for name in adapters if scale == 1 else ["dora"]:
            changed = merged(model, adapters[name], scale)
            expected = oracle.logprobs(changed.state_dict(), model.config, tokens)[FIRST - 1 :]
            found = engine.teacher_forced(tokens, FIRST, adapter=name, adapter_scale=scale)
            assert (found - expected).abs().max() <= 1e-4


@pytest.mark.slow_without_gpu
def test_rows_of_one_batch_have_their_own_adapters(device: torch.device) -> None:
    model = make_model(**SIZES)
    adapters = {
        name: random_adapter(model.config, seed, ranks=(1, 4), dora=dora)
        for seed, (name, dora) in enumerate([("dora", 1.0), ("plain", 0.0)])
    }
    names = ["dora", None, "plain", "dora"]
    requests = [
        make_request(random_tokens(9, seed=i), 6, str(i), adapter=name, adapter_scale=0.5 if i == 3 else 1.0)
        for i, name in enumerate(names)
    ]
    with own_stream(device):
        found = GpuEngine(model, device, adapters=adapters, num_blocks=30, max_num_seqs=4).generate(requests)
    for request, name, tokens in zip(requests, names, found, strict=True):
        alone = model if name is None else merged(model, adapters[name], request.adapter_scale)
        plain = make_request(list(request.prompt_token_ids), 6)
        assert ModelEngine(alone).generate([plain]) == [tokens]
