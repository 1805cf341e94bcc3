"""Mixtures of experts in Hugging Face folders: their configs, and their matrices, which files hold one by one."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.plan import Place, PlannedTensor, assembled
from stellarbyte.config import ByteModelConfig

# E experts, C hidden size, I inner size of an expert

RENAMED = {"block_sparse_moe.": "mlp.", ".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}  # Mixtral's
MATRIX = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight(\.\w+)?")


def expert_options(source: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a ByteModelConfig that describe the experts of `source`; {} where it has none.

    Raises:
        ValueError: the source uses something that a ByteTransformer cannot be.
    """
    kind = source.model_type
    if getattr(source, "router_jitter_noise", 0):
        raise ValueError(f"router_jitter_noise {source.router_jitter_noise} is not supported")
    if getattr(source, "clip_qkv", None) is not None:
        raise ValueError(f"clip_qkv {source.clip_qkv} is not supported")
    layers = list(range(source.num_hidden_layers))
    if kind in ("qwen2_moe", "qwen3_moe"):
        step, dense = source.decoder_sparse_step, source.mlp_only_layers
        layers = [layer for layer in layers if layer not in dense and (layer + 1) % step == 0]
    if not layers or not source.num_experts:
        return {}
    options = {
        "num_experts": source.num_experts,
        "num_experts_per_tok": source.num_experts_per_tok,
        "moe_intermediate_size": getattr(source, "moe_intermediate_size", source.intermediate_size),
        "moe_layers": None if len(layers) == source.num_hidden_layers else layers,
        "norm_topk_prob": kind in ("mixtral", "gpt_oss") or source.norm_topk_prob,
    }
    if source.output_router_logits:  # without them, the source adds no such loss
        options["router_balance_coef"] = source.router_aux_loss_coef
    if kind == "qwen2_moe":
        options["shared_expert_intermediate_size"] = source.shared_expert_intermediate_size
        options["shared_expert_gate"] = True
    return options


def expert_name(name: str) -> str:
    """The name of a tensor in the words of transformers' runtime modules, which not all files use."""
    if ".block_sparse_moe." in name:
        for old, new in RENAMED.items():
            name = name.replace(old, new)
    return name


def with_stacked_experts(
    folder: Path, tensors: Mapping[str, PlannedTensor], config: ByteModelConfig
) -> dict[str, PlannedTensor]:
    """The tensors with the matrices of single experts stacked: gate_up_proj [E, 2 I, C] and down_proj [E, C, I].

    Files that hold the stacks already are left as they are. Of quantized matrices, codes, scales and zeros are stacked.

    Raises:
        CheckpointError: a matrix is missing, too many, or of another shape or type than the config and the others say.
    """
    found = [match for name in tensors if (match := MATRIX.fullmatch(name))]
    if extra := [match[0] for match in found if int(match[2]) >= config.num_experts]:
        raise CheckpointError(f"{folder} holds the tensor {extra[0]}, which the config does not imply.")
    stacked = {name: tensor for name, tensor in tensors.items() if not MATRIX.fullmatch(name)}
    for module, ending in sorted({(match[1], match[4] or "") for match in found}):
        for stack, kinds in {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.items():
            names = [
                f"{module}.{expert}.{kind}_proj.weight{ending}"
                for expert in range(config.num_experts)
                for kind in kinds
            ]
            stacked[f"{module}.{stack}{ending}"] = _stacked(folder, tensors, names, len(kinds))
    return stacked


def _stacked(folder: Path, tensors: Mapping[str, PlannedTensor], names: list[str], num_kinds: int) -> PlannedTensor:
    """The matrices of `names` as one stack; each `num_kinds` neighbours are below each other in one of its layers."""
    pieces: list[tuple[Place, PlannedTensor]] = []
    for number, name in enumerate(names):
        if name not in tensors:
            raise CheckpointError(f"{folder} lacks the tensor {name}, which the config implies.")
        matrix, first = tensors[name], tensors[names[0]]
        if matrix.shape != first.shape or matrix.dtype != first.dtype:
            raise CheckpointError(
                f"{folder} holds {name} as {matrix.dtype} {list(matrix.shape)}, but {names[0]} as {first.dtype} "
                f"{list(first.shape)}; they must be alike."
            )
        expert, kind = divmod(number, num_kinds)
        rows = matrix.shape[0]
        pieces.append(((expert, slice(kind * rows, (kind + 1) * rows)), matrix))
    return assembled((len(names) // num_kinds, num_kinds * rows, *matrix.shape[1:]), pieces)
