"""A sequence's numbers on the CPU kernels, bit for bit: alone, in batches and chunks, preempted, from the cache."""

from functools import partial
from typing import Any

import pytest

from stellarbyte.backends.cpu_model import CpuModel
from tests.support.cases import SLOW
from tests.support.engines.engine import ModelEngine
from tests.support.engines.same_bits import WAYS, Logprobs, assert_same_bits, logprobs_of, make_requests
from tests.support.models.adapters import random_adapter
from tests.support.models.byte_transformer import EXPERTS, W, make_model

SIZES = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
DENSE: dict[str, Any] = {"qk_norm": True, "num_key_value_heads": 2}
WINDOWS = {"sliding_window": W, "sink_tokens": 4}
MIXED = EXPERTS | {
    "moe_intermediate_size": 64,
    "moe_layers": [0, 2],
    "shared_expert_intermediate_size": 64,
    "shared_expert_gate": True,
}


@pytest.mark.parametrize(
    ("config", "quantization", "num_requests"),
    [
        pytest.param(DENSE, "none", 24, id="dense"),
        pytest.param(WINDOWS, "int8", 24, id="windows, int8"),
        pytest.param(DENSE | WINDOWS, "int4", 24, id="int4", marks=SLOW),
        pytest.param(MIXED | WINDOWS, "none", 24, id="experts", marks=SLOW),
        pytest.param(MIXED, "int8", 24, id="experts, int8", marks=SLOW),
        pytest.param(MIXED, "int4", 24, id="experts, int4", marks=SLOW),
        pytest.param(WINDOWS, "int8", 200, id="200 requests", marks=SLOW),
        pytest.param(MIXED, "int4", 200, id="200 requests, experts", marks=SLOW),
    ],
)
def test_the_same_bits_in_every_way(config: dict[str, Any], quantization: str, num_requests: int) -> None:
    model = make_model(**SIZES | config)
    backend = partial(CpuModel, quantization=quantization, num_threads=2, is_invariant=True)
    adapters = {"a": random_adapter(model.config, seed=1)}

    def engine(**options: int) -> ModelEngine:
        return ModelEngine(model, backend=backend, adapters=adapters, **options)

    assert_same_bits(engine, make_requests(num_requests))


def test_queries_that_could_be_computed_in_tiles() -> None:
    """As only a batch of whole prompts could have them, with heads and blocks that tiles divide."""
    model, requests = make_model(**SIZES, head_dim=32), make_requests(9, adapters=[None])
    backend = partial(CpuModel, quantization="none", num_threads=2, is_invariant=True)
    chunked = logprobs_of(ModelEngine(model, backend=backend, block_size=16, max_num_batched_tokens=9), requests)
    assert logprobs_of(ModelEngine(model, backend=backend, block_size=16, **WAYS["batch"]), requests) == chunked


def test_without_it_products_of_few_tokens_have_another_order() -> None:
    """What the flag is there for."""
    model, requests = make_model(**SIZES), [request for request in make_requests(6) if request.adapter is None]
    backend = partial(CpuModel, quantization="fp8", num_threads=2)
    alone: Logprobs = {}
    for request in requests:
        alone |= logprobs_of(ModelEngine(model, backend=backend), [request])
    assert logprobs_of(ModelEngine(model, backend=backend, **WAYS["batch"]), requests) != alone
