"""Tiny random folders of supported models as transformers saves them, with a tokenizer, for tests."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BOS, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # token ids 0, 1, 2
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def tiny_llama(path: Path, **overrides: Any) -> Path:
    """A LlamaForCausalLM folder at `path`; `overrides` as in `save_tiny`."""
    return save_tiny(path, LlamaConfig, LlamaForCausalLM, overrides)


def tiny_mistral(path: Path, **overrides: Any) -> Path:
    """A Mistral folder whose every layer has a window of 8 tokens."""
    return save_tiny(path, MistralConfig, MistralForCausalLM, {"sliding_window": 8, "head_dim": 8} | overrides)


def tiny_qwen2(path: Path, **overrides: Any) -> Path:
    """A Qwen2 folder with biases on q, k and v; without a window unless `use_sliding_window=True`."""
    return save_tiny(path, Qwen2Config, Qwen2ForCausalLM, overrides)


def tiny_qwen3(path: Path, **overrides: Any) -> Path:
    """A Qwen3 folder: norms of queries and keys, heads wider than hidden_size / heads."""
    return save_tiny(path, Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16} | overrides)


def tiny_mixtral(path: Path, **overrides: Any) -> Path:
    """A Mixtral folder with 6 experts in every layer."""
    return save_tiny(path, MixtralConfig, MixtralForCausalLM, {"num_local_experts": 6} | overrides)


def tiny_qwen2_moe(path: Path, **overrides: Any) -> Path:
    """A Qwen2-MoE folder: 6 experts and a shared one with a gate in every second layer."""
    sizes = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "decoder_sparse_step": 2}
    options = sizes | {"shared_expert_intermediate_size": 40} | overrides
    return save_tiny(path, Qwen2MoeConfig, Qwen2MoeForCausalLM, options)


def tiny_qwen3_moe(path: Path, **overrides: Any) -> Path:
    """A Qwen3-MoE folder: 8 experts with renormalised gates in all layers but the first."""
    sizes = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "mlp_only_layers": [0]}
    options = sizes | {"head_dim": 16, "norm_topk_prob": True} | overrides
    return save_tiny(path, Qwen3MoeConfig, Qwen3MoeForCausalLM, options)


def tiny_olmoe(path: Path, **overrides: Any) -> Path:
    """An OLMoE folder: 6 experts in every layer, norms over the whole of queries and keys."""
    return save_tiny(path, OlmoeConfig, OlmoeForCausalLM, {"num_experts": 6, "num_experts_per_tok": 2} | overrides)


def save_tiny(
    path: Path, config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel], overrides: dict[str, Any]
) -> Path:
    """Save a random model and its tokenizer in `path`.

    `overrides` are fields of the config, and options of this function: `chat_template` (None: none), `max_shard_size`
    and `save_original_format` (False: stacks of experts; both as in save_pretrained), and `dtype`.
    """
    settings = SHAPE | overrides
    chat_template = settings.pop("chat_template", CHAT_TEMPLATE)
    max_shard_size = settings.pop("max_shard_size", "1GB")
    original_format = settings.pop("save_original_format", True)
    dtype = settings.pop("dtype", torch.float32)
    torch.manual_seed(0)
    model = model_class(config_class(**settings)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers starts them at 0 and 1: they would not be tested
            if name.endswith(("bias", "sinks")) or "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(path, max_shard_size=max_shard_size, save_original_format=original_format)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(settings["vocab_size"]),
        bos_token=BOS,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(path)
    return path


def tiny_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE: three special tokens, 256 bytes and a few merges; every text has a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 290),
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in (BOS, START, END)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the capital of France is Paris, and the assistant answers the user in the same language"
    tokenizer.train_from_iterator([text] * 4, trainer)
    return tokenizer
