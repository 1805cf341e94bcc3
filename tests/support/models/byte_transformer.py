"""Small random ByteTransformers for tests, with weights large enough that every part of the model matters."""

import random
from typing import Any

import torch

from stellarbyte import ByteModelConfig, ByteTransformer

VOCABULARY = 97
W = 12  # the window of those that have one
VARIANTS = {
    "llama": {"use_xpos": False, "attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    "mistral": {"use_xpos": False, "sliding_window": W},
    "qwen2": {
        "use_xpos": False,
        "attention_bias": True,
        "sliding_window": W,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "qwen3": {"use_xpos": False, "qk_norm": True, "tie_word_embeddings": True},
    "xpos": {"hidden_act": "gelu"},
    "xpos window sinks": {"sliding_window": W, "sink_tokens": 4, "hidden_act": "gelu_tanh"},
    "layer scale": {"layer_scale_init": 0.1},
    "parallel": {"parallel_residual": True, "layer_scale_init": 0.1},
    "norms after": {
        "branch_norms": "after",
        "qk_norm": True,
        "qk_norm_per_head": False,
        "sliding_window": W,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "residual_multiplier": 0.7,
    },
    "norms before and after": {
        "use_xpos": False,
        "branch_norms": "both",
        "zero_centered_norms": True,
        "qk_norm": True,
        "tie_word_embeddings": True,
        "embedding_multiplier": 7.0,
        "attention_multiplier": 0.3,
        "attention_softcap": 2.0,
        "logits_softcap": 3.0,
        "sliding_window": W,
        "sink_tokens": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "layer_rotations": ["local", "global", "local"],
        "local_rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "hidden_act": "gelu_tanh",
    },
    "rotation of a part, not in all layers": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        "layer_rotations": ["global", "none", "global"],
        "logits_multiplier": 0.25,
        "embedding_multiplier": 3,
        "residual_multiplier": 0.4,
        "layer_scale_init": 0.1,
    },
    "sinks of the softmax": {
        "softmax_sink": True,
        "sliding_window": W,
        "sink_tokens": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "attention_softcap": 2.0,
    },
    "sinks of the softmax, plain": {"softmax_sink": True, "use_xpos": False},
    "deepnorm": {"deepnorm": True},
    "deepnorm parallel": {"deepnorm": True, "parallel_residual": True},
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
EXPERT_VARIANTS: dict[str, dict[str, Any]] = {
    "experts": EXPERTS,
    "experts, shared with a gate, some layers dense": EXPERTS
    | {
        "moe_layers": [0, 2],
        "shared_expert_intermediate_size": 40,
        "shared_expert_gate": True,
        "norm_topk_prob": False,
    },
    "experts by sigmoid and biases": EXPERTS
    | {"router_score": "sigmoid", "router_bias": True, "router_selection_bias": True, "num_experts_per_tok": 3},
    "experts of pools, one shared": EXPERTS | {"expert_pools": [4, 2, 4], "shared_expert_intermediate_size": 16},
    "experts by share": EXPERTS | {"router_top_p": 0.8, "num_experts_per_tok": 5, "min_experts_per_tok": 2},
    "experts, parallel, norms over all heads": EXPERTS
    | {"parallel_residual": True, "qk_norm": True, "qk_norm_per_head": False, "hidden_act": "gelu_tanh"},
    "experts, deepnorm, windows": EXPERTS
    | {"deepnorm": True, "sliding_window": W, "sink_tokens": 4, "layer_scale_init": 0.1},
    "experts, norms before and after": EXPERTS
    | {"branch_norms": "both", "zero_centered_norms": True, "residual_multiplier": 0.7, "moe_layers": [1, 2]},
    "experts with biases, clamped": EXPERTS
    | {
        "expert_bias": True,
        "router_bias": True,
        "swiglu_limit": 1.0,
        "swiglu_alpha": 1.702,
        "softmax_sink": True,
        "use_xpos": False,
        "sliding_window": W,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "experts, norms after": EXPERTS | {"branch_norms": "after", "embedding_multiplier": 3, "logits_softcap": 3.0},
}


def make_config(**overrides: Any) -> ByteModelConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "xpos_scale_base": 32,
    }
    return ByteModelConfig(**(settings | overrides))


def make_model(seed: int = 0, **overrides: Any) -> ByteTransformer:
    """A model in evaluation mode whose norms and biases are random too."""
    torch.manual_seed(seed)
    model = ByteTransformer(make_config(**overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "_scale.weight", "softmax_sink")) or "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def random_tokens(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=length)


@torch.no_grad()
def assert_same_model(loaded: ByteTransformer, model: ByteTransformer, tokens: torch.Tensor) -> None:
    """The same weights, bit for bit. Of the logits the last bits may differ: a product of a matrix depends on where in
    memory the matrix begins."""
    weights, expected = loaded.state_dict(), model.state_dict()
    assert weights.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
