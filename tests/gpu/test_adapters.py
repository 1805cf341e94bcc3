"""The bank of adapters on the card."""

import pytest
import torch

from stellarbyte.lora.bank import LoraBank, pack_adapter
from tests.support.models.adapters import random_adapter
from tests.support.models.byte_transformer import make_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]


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
