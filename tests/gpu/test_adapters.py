"""Adapters on the card: the bank's slots, and a mixed batch against the CPU."""

import copy

import pytest
import torch

from stellarbyte.lora.bank import LoraBank, pack_adapter
from tests.adapters import random_adapter
from tests.engine import ModelEngine, make_request
from tests.models import make_config, make_model, random_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]


def test_a_mixed_batch_gets_the_tokens_it_gets_on_the_cpu() -> None:
    model = make_model()
    adapters = {f"a{i}": random_adapter(model.config, seed=i, share=0.8) for i in range(4)}
    names = [None, *adapters]
    requests = [
        make_request(
            random_tokens(5 + 3 * i, seed=i), 12, str(i), seed=i, temperature=0.8 * (i % 2),
            adapter=names[i % 5], adapter_scale=(1.0, 0.5, 2.0)[i % 3],
        )
        for i in range(15)
    ]  # fmt: skip
    expected = ModelEngine(model, adapters=adapters, num_blocks=200).generate(requests)
    on_card = copy.deepcopy(model).to("cuda")
    engine = ModelEngine(on_card, adapters=adapters, device="cuda", num_blocks=200, max_num_batched_tokens=13)
    assert engine.generate(requests) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_are_filled_and_cleared_at_the_same_addresses(dtype: torch.dtype) -> None:
    config = make_config()
    bank = LoraBank(config, 2, 16, dtype, "cuda")
    address = bank.numbers_SF.data_ptr()
    for seed in range(3):
        adapter = random_adapter(config, seed)
        packed = pack_adapter(adapter.weights, adapter.scales, config, dtype)
        bank.fill(2, packed)
        assert torch.equal(bank.numbers_SF[2, : len(packed.numbers)].cpu(), packed.numbers)
        bank.clear(2)
        assert bank.ranks_SLP.sum() == 0
    assert bank.numbers_SF.data_ptr() == address
