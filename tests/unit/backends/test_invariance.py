"""A sequence's numbers on the CPU kernels, bit for bit: alone, in batches and chunks, preempted, from the cache."""

from functools import partial
from typing import Any

import pytest

from stellarbyte.backends.cpu_model import CpuModel
from stellarbyte_server.protocol.messages import TokenLogprob
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.cases import SLOW
from tests.support.engines.engine import ModelEngine, make_request
from tests.support.models.adapters import random_adapter
from tests.support.models.byte_transformer import EXPERTS, W, make_model, random_tokens

SIZES = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
DENSE: dict[str, Any] = {"qk_norm": True, "num_key_value_heads": 2}
WINDOWS = {"sliding_window": W, "sink_tokens": 4}
MIXED = EXPERTS | {
    "moe_intermediate_size": 64,
    "moe_layers": [0, 2],
    "shared_expert_intermediate_size": 64,
    "shared_expert_gate": True,
}
WAYS = {
    "batch": {"max_num_seqs": 64, "max_num_batched_tokens": 512, "num_blocks": 1024},
    "pairs": {"max_num_seqs": 2},
    "chunks": {"max_num_seqs": 7, "max_num_batched_tokens": 9},
    "preempted": {"max_num_seqs": 64, "num_blocks": 60},
}

Logprobs = dict[str, list[TokenLogprob]]


def make_requests(number: int) -> list[GenerationRequest]:
    """Of many lengths, greedy and sampled, some with an adapter; every token comes with the 3 likeliest."""
    return [
        make_request(
            random_tokens(3 + 7 * (i % 9), seed=i),
            12 + i % 5,
            str(i),
            seed=i,
            temperature=float(i % 2),
            logprobs=3,
            adapter="a" if i % 3 == 0 else None,
            repetition_penalty=1.0 + 0.1 * (i % 2),
        )
        for i in range(number)
    ]


def logprobs_of(engine: ModelEngine, requests: list[GenerationRequest]) -> Logprobs:
    found: Logprobs = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.scheduler.has_work:
        chunks = engine.scheduler.schedule()
        step = engine.runner.start(chunks)
        step.finish()
        result = step.result()
        for number, logprobs in result.logprobs.items():
            found[chunks[number].sequence.request.request_id] += logprobs
        for sequence, _ in engine.scheduler.apply(chunks, result.tokens):
            if sequence.num_generated >= sequence.request.sampling.max_tokens:
                engine.scheduler.remove(sequence)
    assert all(len(found[request.request_id]) == request.sampling.max_tokens for request in requests)
    return found


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

    requests = make_requests(num_requests)
    alone: Logprobs = {}
    for request in requests:
        alone |= logprobs_of(engine(), [request])
    for name, options in WAYS.items():
        together = engine(**options)
        assert logprobs_of(together, requests) == alone, name
        if name == "preempted":
            assert together.scheduler.totals.num_preemptions > 0
    cached = engine(num_blocks=4096, max_num_seqs=5, max_num_batched_tokens=64)
    logprobs_of(cached, requests)
    assert logprobs_of(cached, requests[::-1]) == alone
    assert cached.scheduler.totals.prefix_hits > 0


def test_without_it_products_of_few_tokens_have_another_order() -> None:
    """What the flag is there for."""
    model, requests = make_model(**SIZES), [request for request in make_requests(6) if request.adapter is None]
    backend = partial(CpuModel, quantization="int8", num_threads=2)
    alone: Logprobs = {}
    for request in requests:
        alone |= logprobs_of(ModelEngine(model, backend=backend), [request])
    assert logprobs_of(ModelEngine(model, backend=backend, **WAYS["batch"]), requests) != alone
