"""Tiny random folders of families that differ from Llama by options, each with what makes it differ switched on."""

from pathlib import Path
from typing import Any

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from tests.support.models.hugging_face import save_tiny

LENGTH = 40  # several windows, and beyond longrope's original length
WINDOW = 8
ORIGINAL_LENGTH = 24  # longrope's short factors are for sequences up to it

# Heads of 16 channels, which the CPU kernels take. Local and global layers alternate.
SHAPE: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "initializer_range": 0.2}
ALTERNATING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.5, 2.0, 3.0, 5.0, 8.0, 13.0],
}
BOTH_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0}

FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel], dict[str, Any]]] = {
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {"no_rope_layers": [1, 0, 1], "attention_bias": True}),
    "smollm3 window": (
        SmolLM3Config,
        SmolLM3ForCausalLM,
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": WINDOW, "rope_parameters": YARN},
    ),
    "granite": (
        GraniteConfig,
        GraniteForCausalLM,
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.22,
            "logits_scaling": 3.0,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"sliding_window": WINDOW}),
    "phi3 longrope": (
        Phi3Config,
        Phi3ForCausalLM,
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL_LENGTH},
    ),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {"attention_bias": True}),
    "olmo3": (
        Olmo3Config,
        Olmo3ForCausalLM,
        {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}}, **ALTERNATING},
    ),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {**GEMMA, **ALTERNATING, "tie_word_embeddings": True}),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {**GEMMA, **ALTERNATING, "tie_word_embeddings": True, "rope_parameters": BOTH_ROPES},
    ),
    "gpt_oss": (
        GptOssConfig,
        GptOssForCausalLM,
        {
            "head_dim": 16,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "swiglu_limit": 1.5,
            "rope_parameters": YARN | {"truncate": False},
            **ALTERNATING,
        },
    ),
    "ministral": (MinistralConfig, MinistralForCausalLM, {**ALTERNATING, "head_dim": 16}),
}


def tiny_family(path: Path, name: str, **overrides: Any) -> Path:
    """The folder of a family of the table, as transformers saves it, with a tokenizer."""
    config_class, model_class, settings = FAMILIES[name]
    return save_tiny(path, config_class, model_class, SHAPE | settings | overrides)
