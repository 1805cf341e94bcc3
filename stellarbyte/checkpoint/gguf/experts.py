"""Mixtures of experts in GGUF files: their metadata, and their stacks of matrices."""

import re
from collections.abc import Mapping
from typing import Any

from stellarbyte.checkpoint.gguf.file import GGUFFile
from stellarbyte.checkpoint.plan import Place, PlannedTensor, assembled

# E experts, C hidden size, I inner size of an expert

RENORMALISING = ("llama", "qwen3moe", "gpt-oss")  # whose gates llama.cpp divides by their sum
SOFTMAX = 1  # of expert_gating_func
NOT_SUPPORTED = (  # metadata of other architectures that would change the model
    *("expert_weights_scale", "expert_group_count", "expert_group_used_count", "expert_group_scale"),
    *("leading_dense_block_count", "interleave_moe_layer_step", "moe_every_n_layers", "swiglu_clamp_exp"),
)
_ROUTER = re.compile(r"blk\.(\d+)\.ffn_gate_inp\.weight")


def expert_options(file: GGUFFile, architecture: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ByteModelConfig that describe a file's experts; {} where it has none.

    Args:
        metadata: the fields of the architecture, without its name.

    Raises:
        KeyError: metadata is absent.
        ValueError: the file uses something that a ByteTransformer cannot be.
    """
    if not metadata.get("expert_count"):
        return {}
    for name in NOT_SUPPORTED:
        if metadata.get(name):
            raise ValueError(f"{architecture}.{name} is not supported")
    if metadata.get("expert_gating_func", SOFTMAX) != SOFTMAX:
        raise ValueError(f"{architecture}.expert_gating_func {metadata['expert_gating_func']} is not supported")
    if "expert_used_count" not in metadata:
        raise KeyError(f"{architecture}.expert_used_count")
    layers = sorted(int(match[1]) for name in file.tensors if (match := _ROUTER.fullmatch(name)))
    options = {
        "num_experts": metadata["expert_count"],
        "num_experts_per_tok": metadata["expert_used_count"],
        "moe_intermediate_size": metadata.get("expert_feed_forward_length", metadata["feed_forward_length"]),
        "moe_layers": layers if len(layers) < metadata["block_count"] else None,
        "norm_topk_prob": metadata.get("expert_weights_norm", architecture in RENORMALISING),
    }
    shared = next((tensor for name, tensor in file.tensors.items() if name.endswith(".ffn_up_shexp.weight")), None)
    if shared is not None:
        options["shared_expert_intermediate_size"] = shared.shape[0]
        options["shared_expert_gate"] = any(".ffn_gate_inp_shexp." in name for name in file.tensors)
    return options


def with_joined_experts(tensors: Mapping[str, PlannedTensor]) -> dict[str, PlannedTensor]:
    """The tensors by their names in the file, with gates above ups: ffn_gate_exps and ffn_up_exps [E, I, C] become
    ffn_gate_up_exps [E, 2 I, C], and their biases [E, I] become [E, 2 I]. The gate of a shared expert, which files
    store as [C], becomes [1, C]."""
    joined: dict[str, PlannedTensor] = {}
    for name, tensor in tensors.items():
        other = tensors.get(name.replace(".ffn_gate_exps.", ".ffn_up_exps."))
        if ".ffn_gate_exps." in name and other is not None and other.shape == tensor.shape:
            count, size, *width = tensor.shape
            gates: Place = (slice(None), slice(0, size))
            ups: Place = (slice(None), slice(size, 2 * size))
            stack = assembled((count, 2 * size, *width), [(gates, tensor), (ups, other)])
            joined[name.replace(".ffn_gate_exps.", ".ffn_gate_up_exps.")] = stack
        elif name.endswith(".ffn_gate_inp_shexp.weight") and len(tensor.shape) == 1:
            joined[name] = assembled((1, *tensor.shape), [((0,), tensor)])
        elif not (".ffn_up_exps." in name and name.replace(".ffn_up_exps.", ".ffn_gate_exps.") in tensors):
            joined[name] = tensor
    return joined
