"""Packing adapters for the bank: every number is what the formula says, bit for bit."""

import pytest
import torch

from stellarbyte.lora.bank import LoraBank, pack_adapter
from stellarbyte.model.parts import module_path
from tests.support.models.adapters import random_adapter
from tests.support.models.byte_transformer import make_config


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("served", [torch.float32, torch.bfloat16])
def test_the_bank_holds_a_and_b_times_alpha_over_r_rounded_once(stored: torch.dtype, served: torch.dtype) -> None:
    config = make_config()
    adapter = random_adapter(config, seed=1, share=0.7)
    weights = {name: (a.to(stored), b.to(stored)) for name, (a, b) in adapter.weights.items()}
    bank = LoraBank(config, 1, 16, served)
    bank.fill(1, pack_adapter(weights, adapter.scales, config, served))
    num_compared = 0
    for layer in range(config.num_hidden_layers):
        for group in bank.projections.shared_inputs.values():
            ranks = bank.ranks_SLP[1, layer, group].tolist()
            for i, a in enumerate(bank.a(1, layer, group).split(ranks)):
                name = module_path(layer, bank.projections.names[group.start + i])
                if name in weights:
                    expected_a, expected_b = weights[name]
                    assert torch.equal(a, expected_a.to(served))
                    scaled = expected_b.float() * adapter.scales[name]
                    assert torch.equal(bank.b(1, layer, group.start + i), scaled.to(served).T)
                    num_compared += 1
                else:
                    assert len(a) == 0
    assert num_compared == len(weights)
