"""A sequence's numbers on the GPU kernels, bit for bit: alone, in batches and chunks, preempted, from the cache; on a
CPU by Triton's interpreter."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte.lora.bank import REPLACEABLE
from tests.support.cases import SLOW_WITHOUT_GPU
from tests.support.engines.same_bits import assert_same_bits, make_requests
from tests.support.gpu.gpu_engine import GpuEngine, own_stream
from tests.support.gpu.triton_dots import placeless_dots
from tests.support.models.adapters import random_adapter
from tests.support.models.byte_transformer import EXPERTS, W, make_model

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_key_value_heads": 1}
WINDOWS = {"sliding_window": W, "sink_tokens": 4}
MIXED = EXPERTS | {"moe_layers": [1], "shared_expert_intermediate_size": 64, "shared_expert_gate": True}
WAYS = {
    "batch": {"max_num_seqs": 16, "max_num_batched_tokens": 96, "num_blocks": 256},
    "chunks": {"max_num_seqs": 3, "max_num_batched_tokens": 9},
    "preempted": {"max_num_seqs": 16, "num_blocks": 9},
}


@pytest.fixture(autouse=True)
def stream(device: torch.device):
    with own_stream(device), placeless_dots():
        yield


@pytest.mark.parametrize(
    ("config", "quantization"),
    [
        pytest.param({"qk_norm": True, "num_hidden_layers": 1}, "none", id="dense"),
        pytest.param(WINDOWS, "int8", id="windows, int8", marks=SLOW_WITHOUT_GPU),
        pytest.param(WINDOWS, "fp8", id="windows, fp8", marks=SLOW_WITHOUT_GPU),
        pytest.param({}, "int4", id="int4", marks=SLOW_WITHOUT_GPU),
        pytest.param(MIXED, "none", id="experts", marks=SLOW_WITHOUT_GPU),
        pytest.param(MIXED | WINDOWS, "int8", id="experts, int8", marks=SLOW_WITHOUT_GPU),
    ],
)
def test_the_same_bits_in_every_way(config: dict[str, Any], quantization: str, device: torch.device) -> None:
    model = make_model(**SIZES | config)
    adapters = {
        "plain": random_adapter(model.config, seed=1, ranks=(4, 16)),
        "beyond": random_adapter(model.config, seed=2, ranks=(4,), dora=0.5, replaced=REPLACEABLE),
    }

    def engine(**options: int) -> GpuEngine:
        return GpuEngine(model, device, adapters=adapters, quantization=quantization, is_invariant=True, **options)

    requests = make_requests(3, adapters=("plain", None, "beyond"), shortest=3)
    assert_same_bits(engine, requests, WAYS, {"num_blocks": 256, "max_num_seqs": 2, "max_num_batched_tokens": 24})
