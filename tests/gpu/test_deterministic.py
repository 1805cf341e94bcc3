"""`--deterministic` on the card: the real engine gives 200 prompts the same log-probabilities, bit for bit, alone, in
batches of 2 to 64, in chunks, preempted and from the cache."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported: the unit tests want its interpreter then
    pytest.skip("torch finds no CUDA device here", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte.checkpoint.convert import convert
from stellarbyte.lora.bank import REPLACEABLE
from stellarbyte_client.terminal.connection import Connection
from stellarbyte_client.terminal.replay import replay
from tests.support.engines.same_bits import assert_same_bits, logprobs_of, make_requests
from tests.support.gpu.gpu_engine import GpuEngine, own_stream
from tests.support.models.adapters import random_adapter
from tests.support.models.byte_transformer import EXPERTS, W, make_model
from tests.support.models.hugging_face import tiny_llama
from tests.support.servers.server_process import REAL, running

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
# Widths that divide by no tile, and a vocabulary whose rows begin anywhere in their 16 bytes.
SIZES = {"hidden_size": 288, "intermediate_size": 608, "num_hidden_layers": 3, "vocab_size": 1003}
WINDOWS = {"sliding_window": W, "sink_tokens": 4}
MIXED = EXPERTS | {
    "moe_intermediate_size": 96,
    "moe_layers": [0, 2],
    "shared_expert_intermediate_size": 64,
    "shared_expert_gate": True,
}
WAYS = {f"batches of {size}": {"max_num_seqs": size} for size in (2, 3, 8, 17, 64)} | {
    "one step of many prompts": {"max_num_seqs": 64, "max_num_batched_tokens": 4096},
    "chunks": {"max_num_seqs": 7, "max_num_batched_tokens": 9},
    "preempted": {"max_num_seqs": 64, "max_num_batched_tokens": 512, "num_blocks": 60},
}
CACHED = {"max_num_seqs": 5, "num_blocks": 8000}


@pytest.fixture(autouse=True)
def stream() -> Iterator[None]:
    with own_stream(DEVICE):
        yield


@pytest.mark.parametrize(
    ("config", "dtype", "quantization"),
    [
        pytest.param({"qk_norm": True, "num_key_value_heads": 2}, torch.float32, "none", id="dense, float32"),
        pytest.param({"num_key_value_heads": 2}, torch.bfloat16, "none", id="dense"),
        pytest.param(WINDOWS, torch.bfloat16, "int8", id="windows, int8"),
        pytest.param(WINDOWS, torch.bfloat16, "fp8", id="windows, fp8"),
        pytest.param({}, torch.bfloat16, "int4", id="int4"),
        pytest.param(MIXED, torch.bfloat16, "none", id="experts"),
        pytest.param(MIXED | WINDOWS, torch.bfloat16, "int8", id="experts, int8"),
    ],
)
def test_200_prompts_have_the_same_bits_in_every_way(
    config: dict[str, Any], dtype: torch.dtype, quantization: str
) -> None:
    model = make_model(**SIZES | config)
    adapters = {
        "plain": random_adapter(model.config, seed=1),
        "beyond": random_adapter(model.config, seed=2, dora=0.5, replaced=REPLACEABLE),
    }

    def engine(**options: int) -> GpuEngine:
        sizes = {"block_size": 16, "num_blocks": 2000, "max_num_seqs": 1, "max_num_batched_tokens": 64} | options
        return GpuEngine(
            model, DEVICE, dtype=dtype, adapters=adapters, quantization=quantization, is_invariant=True, **sizes
        )

    requests = make_requests(200, adapters=(None, "plain", None, "beyond"))
    assert_same_bits(engine, requests, WAYS, CACHED)


def test_a_server_replays_receipts_while_others_ask(tmp_path: Path) -> None:
    """The flag as a user gives it."""
    model = str(convert(tiny_llama(tmp_path / "llama", head_dim=16), tmp_path / "tiny"))

    def ask(prompt: str) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 40, "temperature": 1.0, "receipt": True}
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).raise_for_status().json()["receipt"]

    with running(REAL, "--model", model, "--device", DEVICE.type, "--deterministic") as server:
        receipts = [ask(f"Once upon {n}") for n in range(3)]
        assert all(receipt["numeric_mode"]["deterministic"] for receipt in receipts)
        with ThreadPoolExecutor(8) as threads:
            others = [threads.submit(ask, f"Count to {n}") for n in range(16)]
            for receipt in receipts:
                comparison = replay(Connection(url=server.url, api_key=None), receipt)
                assert comparison.is_equal and len(comparison.lines) == 1, comparison.lines
            for other in others:
                other.result()


def test_without_it_the_size_of_a_batch_changes_bits() -> None:
    """What the flag is there for."""
    model = make_model(**SIZES)
    requests = make_requests(20, adapters=(None,))

    def engine(size: int) -> GpuEngine:
        return GpuEngine(model, DEVICE, block_size=16, num_blocks=400, max_num_seqs=size, dtype=torch.bfloat16)

    assert logprobs_of(engine(1), requests) != logprobs_of(engine(20), requests)
