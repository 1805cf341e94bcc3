"""Routers and experts with random weights, and hidden states for them."""

from typing import Any

import torch

from stellarbyte.model.moe.experts import ByteExperts
from stellarbyte.model.moe.router import ByteRouter
from tests.support.models.byte_transformer import make_config

NUM_EXPERTS, NUM_TOKENS = 7, 40


def make_router(dtype: torch.dtype = torch.float32, **options: Any) -> ByteRouter:
    """In evaluation mode, its biases random as well."""
    torch.manual_seed(0)
    config = make_config(**({"num_experts": NUM_EXPERTS, "num_experts_per_tok": 3} | options))
    router = ByteRouter(config, 0).eval()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(0, 0.3)
    return router.to(dtype)


def make_experts(num_experts: int, dtype: torch.dtype = torch.float32, **options: Any) -> ByteExperts:
    experts = ByteExperts(make_config(num_experts=num_experts, moe_intermediate_size=24, **options), 0)
    for stack in experts.parameters():
        torch.nn.init.normal_(stack, std=0.3)
    return experts.to(dtype)


def hidden_states(num_tokens: int = NUM_TOKENS) -> torch.Tensor:
    return torch.randn(num_tokens, 48, generator=torch.Generator().manual_seed(1))
