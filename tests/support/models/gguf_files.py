"""Writes tiny GGUF files as llama.cpp's converter would, for tests."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.sinks": "attn_sinks",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
ROUTERS = ("mlp.gate", "mlp.shared_expert_gate")  # which the converter keeps in float32


OUTPUT_NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
INTERLEAVED = ("llama", "granite", "smollm3")  # architectures of which llama.cpp reorders q and k


def gguf_name(name: str, architecture: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    names = NAMES | OUTPUT_NORMS if architecture in ("olmo2", "gpt-oss") else NAMES
    return f"blk.{layer}.{names[part]}.{kind}"


def permute(tensor: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: pairs side by side."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def write_gguf(
    path: Path,
    folder: Path,
    *,
    architecture: str = "llama",
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """The model of a tiny Hugging Face folder (one safetensors file) as a GGUF file, its matrices as `kind`.

    `metadata` is added to what the converter would write; a value of None takes a field away.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fields = llama_fields(config, architecture) | tokenizer_fields(tokenizer, config) | dict(metadata or {})
    writer = GGUFWriter(path, architecture)
    for key, value in fields.items():
        if value is not None:
            add_field(writer, key, value)
    tensors = load_file(folder / "model.safetensors")
    arrays = stacked_experts(gpt_oss_tensors(tensors) if architecture == "gpt-oss" else tensors)
    for name, array in arrays.items():
        if architecture in INTERLEAVED and (".q_proj." in name or ".k_proj." in name):
            array = permute(array, config.num_attention_heads if ".q_" in name else config.num_key_value_heads)
        if array.ndim == 1 or name.endswith(".bias") or name.removesuffix(".weight").endswith(ROUTERS):
            writer.add_tensor(gguf_name(name, architecture), array.squeeze())
        else:
            writer.add_tensor(gguf_name(name, architecture), quantize(array, kind), raw_dtype=kind)
    for name, array in (extra_tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gpt_oss_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """gpt-oss's tensors under Qwen's names: gates and ups apart, stacks with a row for each output."""
    named: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.replace(".mlp.router.", ".mlp.gate.").partition("_proj_bias")[0].rpartition(".")
        is_bias = name.endswith("_proj_bias")
        if ".mlp.experts" not in name:
            suffix = ".weight" if name.endswith(".sinks") else ""
            named[name.replace(".mlp.router.", ".mlp.gate.") + suffix] = tensor
            continue
        rows = tensor if is_bias else tensor.transpose(1, 2)
        ending = "bias" if is_bias else "weight"
        if kind.startswith("gate_up"):
            named[f"{stem}.gate_proj.{ending}"] = rows[:, 0::2].contiguous()
            named[f"{stem}.up_proj.{ending}"] = rows[:, 1::2].contiguous()
        else:
            named[f"{stem}.down_proj.{ending}"] = rows.contiguous()
    return named


def stacked_experts(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The tensors in float32, the matrices of single experts as stacks, under Qwen's names."""
    stacks: dict[str, dict[int, np.ndarray]] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        for mixtral, qwen in (
            ("block_sparse_moe.", "mlp."),
            (".w1.", ".gate_proj."),
            (".w3.", ".up_proj."),
            (".w2.", ".down_proj."),
        ):
            name = name.replace(mixtral, qwen)
        expert = re.fullmatch(r"(.+\.experts)\.(\d+)\.(.+)", name)
        if expert is None:
            arrays[name] = tensor.float().numpy()
        else:
            stacks.setdefault(f"{expert[1]}.{expert[3]}", {})[int(expert[2])] = tensor.float().numpy()
    return arrays | {name: np.stack([stack[e] for e in range(len(stack))]) for name, stack in stacks.items()}


def expert_fields(config: Any) -> dict[str, Any]:
    """What the converter writes of a mixture of experts; {} of a dense model."""
    if not getattr(config, "num_experts", 0):
        return {}
    fields = {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
    for theirs, ours in (("moe_intermediate_size", ""), ("shared_expert_intermediate_size", "shared_")):
        if hasattr(config, theirs):
            fields[f"expert_{ours}feed_forward_length"] = getattr(config, theirs)
    return fields


def llama_fields(config: Any, architecture: str) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        **expert_fields(config),
    }
    if architecture == "gpt-oss":
        rope = config.rope_parameters
        fields |= {
            "attention.sliding_window": config.sliding_window,
            "expert_feed_forward_length": config.intermediate_size,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
    if architecture == "granite":
        fields |= {
            "embedding_scale": config.embedding_multiplier,
            "attention.scale": config.attention_multiplier,
            "residual_scale": config.residual_multiplier,
            "logit_scale": config.logits_scaling,
        }
    return {f"{architecture}.{name}": value for name, value in fields.items()}


def tokenizer_fields(tokenizer: Tokenizer, config: Any) -> dict[str, Any]:
    vocabulary = tokenizer.get_vocab()
    tokens = [token for token, _ in sorted(vocabulary.items(), key=lambda item: item[1])]
    added = {entry.content for entry in tokenizer.get_added_tokens_decoder().values()}
    padding = config.vocab_size - len(tokens)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens + [f"[PAD{index}]" for index in range(padding)],
        "tokenizer.ggml.token_type": [3 if token in added else 1 for token in tokens] + [5] * padding,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        "tokenizer.ggml.padding_token_id": config.pad_token_id,
    }


def add_field(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
