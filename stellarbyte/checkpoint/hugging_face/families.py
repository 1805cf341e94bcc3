"""Families that are Llama with other options: their configs translated, and their tensors renamed, split, reordered."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.hugging_face.experts import expert_options
from stellarbyte.config import ByteModelConfig
from stellarbyte.model import parts
from stellarbyte.model.parts import Part, module_path
from stellarbyte.xpos import rotated_channels

OUTPUT_NORMS = {
    "post_attention_layernorm": "attention_output_norm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "mlp_output_norm",
}
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model_type of transformers.

    Attributes:
        options: the fields of ByteModelConfig that differ from Llama's, from the source's config.
        renamed: modules of a layer that have another name in ByteTransformer.
        fused: linears that are several of ByteTransformer's, one below the other.
        has_interleaved_experts: whether experts are stored as `interleaved_experts` reads them, perhaps in MXFP4.
    """

    model_class: str
    options: Callable[[PreTrainedConfig], dict[str, Any]] = lambda _: {}
    renamed: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    has_interleaved_experts: bool = False


def _smollm3(source: PreTrainedConfig) -> dict[str, Any]:
    rotates = source.no_rope_layers[: source.num_hidden_layers]  # 1 where a layer rotates, in spite of its name
    return {"layer_rotations": ["global" if is_rotated else "none" for is_rotated in rotates]}


def _granite(source: PreTrainedConfig) -> dict[str, Any]:
    return {
        "embedding_multiplier": source.embedding_multiplier,
        "attention_multiplier": source.attention_multiplier,
        "residual_multiplier": source.residual_multiplier,
        "logits_multiplier": 1 / source.logits_scaling,
    }


def _phi3(source: PreTrainedConfig) -> dict[str, Any]:
    rope = dict(source.rope_parameters)
    if rope["rope_type"] == "longrope" and rope.get("factor") is None:
        rope["factor"] = source.max_position_embeddings / rope["original_max_position_embeddings"]
    return {
        "rope_parameters": rope,
        "residual_dropout": source.resid_pdrop,
        "embedding_dropout": source.embd_pdrop,
    }


def _olmo2(_source: PreTrainedConfig) -> dict[str, Any]:
    return {"branch_norms": "after", "qk_norm": True, "qk_norm_per_head": False}


def _olmo3(source: PreTrainedConfig) -> dict[str, Any]:
    return _olmo2(source) | _rotations_by_layer_type(source)


def _gemma2(source: PreTrainedConfig) -> dict[str, Any]:
    if source.use_bidirectional_attention:
        raise ValueError("use_bidirectional_attention is not supported")
    return {
        "branch_norms": "both",
        "zero_centered_norms": True,
        "embedding_multiplier": source.hidden_size**0.5,
        "attention_multiplier": source.query_pre_attn_scalar**-0.5,
        "attention_softcap": source.attn_logit_softcapping,
        "logits_softcap": source.final_logit_softcapping,
    }


def _gemma3(source: PreTrainedConfig) -> dict[str, Any]:
    # transformers' class does not read attn_logit_softcapping.
    return _gemma2(source) | _rotations_by_layer_type(source) | {"qk_norm": True, "attention_softcap": None}


def _qwen2_moe(source: PreTrainedConfig) -> dict[str, Any]:
    return {"attention_bias": source.qkv_bias} | expert_options(source)


def _qwen3_moe(source: PreTrainedConfig) -> dict[str, Any]:
    return {"qk_norm": True} | expert_options(source)


def _olmoe(source: PreTrainedConfig) -> dict[str, Any]:
    return {"qk_norm": True, "qk_norm_per_head": False} | expert_options(source)


def _gpt_oss(source: PreTrainedConfig) -> dict[str, Any]:
    biases = {"router_bias": True, "expert_bias": True}
    # Releases of transformers before 5.24 have no such fields.
    swiglu = {"swiglu_alpha": getattr(source, "swiglu_alpha", 1.702)} | {
        "swiglu_limit": getattr(source, "swiglu_limit", 7.0)
    }
    return expert_options(source) | biases | swiglu | {"softmax_sink": True}


def _rotations_by_layer_type(source: PreTrainedConfig) -> dict[str, Any]:
    kinds = ["local" if kind == "sliding_attention" else "global" for kind in source.layer_types]
    local = dict(source.rope_parameters["sliding_attention"]) if "local" in kinds else None
    return {"layer_rotations": kinds, "local_rope_parameters": local}


FAMILIES: Mapping[str, Family] = {
    "smollm3": Family(model_class="SmolLM3ForCausalLM", options=_smollm3),
    "granite": Family(model_class="GraniteForCausalLM", options=_granite),
    "phi3": Family(model_class="Phi3ForCausalLM", options=_phi3, fused=FUSED),
    "olmo2": Family(model_class="Olmo2ForCausalLM", options=_olmo2, renamed=OUTPUT_NORMS),
    "olmo3": Family(model_class="Olmo3ForCausalLM", options=_olmo3, renamed=OUTPUT_NORMS),
    "gemma2": Family(model_class="Gemma2ForCausalLM", options=_gemma2, renamed=OUTPUT_NORMS),
    "gemma3_text": Family(model_class="Gemma3ForCausalLM", options=_gemma3, renamed=OUTPUT_NORMS),
    "ministral": Family(model_class="MinistralForCausalLM"),
    "mixtral": Family(model_class="MixtralForCausalLM", options=expert_options),
    "qwen2_moe": Family(model_class="Qwen2MoeForCausalLM", options=_qwen2_moe),
    "qwen3_moe": Family(model_class="Qwen3MoeForCausalLM", options=_qwen3_moe),
    "olmoe": Family(model_class="OlmoeForCausalLM", options=_olmoe),
    "gpt_oss": Family(model_class="GptOssForCausalLM", options=_gpt_oss, has_interleaved_experts=True),
}
LLAMA = Family(model_class="LlamaForCausalLM")


def family_options(source: PreTrainedConfig) -> dict[str, Any]:
    """The fields of ByteModelConfig that the source's family has beyond Llama's, or with other values."""
    return FAMILIES.get(source.model_type, LLAMA).options(source)


def common_rope(source: PreTrainedConfig) -> dict[str, Any]:
    """The rope_parameters of the layers without a window, which some configs give by the type of layer."""
    rope = source.rope_parameters
    return dict(rope.get("full_attention", rope))


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows of a stored tensor that are a tensor of the target."""

    name: str  # of the target
    rows: slice
    order: tuple[int, ...] | None  # of those rows in the target; None: as they are


def pieces(model_type: str, name: str, num_rows: int, config: ByteModelConfig) -> list[Piece]:
    """What the tensor `name` of a folder, of `num_rows` rows, is in the target of the config `config`.

    Names are those of transformers' Llama classes on both sides, but for modules that the family, or the table of
    parts, gives another name. Pairs of channels that are rotated together lie half a head apart in the target, also
    where only a part of each head is rotated: those rows of q and k are reordered.

    Raises:
        CheckpointError: a fused linear does not have the rows of its members.
    """
    family = FAMILIES.get(model_type, LLAMA)
    by_name = {part.name: part for part in parts.PARTS} | {part.hugging_face: part for part in parts.PARTS}
    of_layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    part = None if of_layer is None else by_name.get(of_layer[2])
    if of_layer is not None and part is not None and part.kind == "parameter":
        return [Piece(name=module_path(int(of_layer[1]), part.name), rows=slice(0, num_rows), order=None)]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if found is None:
        return [Piece(name=name, rows=slice(0, num_rows), order=None)]
    layer, module, kind = int(found[1]), found[2], found[3]
    if module not in family.fused:
        part = by_name.get(family.renamed.get(module, module))
        target = name if part is None else f"{module_path(layer, part.name)}.{kind}"
        return [Piece(name=target, rows=slice(0, num_rows), order=_row_order(part, config))]
    members = [by_name[member] for member in family.fused[module]]
    heights = [part.shape(config, layer)[0] for part in members]
    if sum(heights) != num_rows:
        raise CheckpointError(f"The tensor {name} has {num_rows} rows; the config implies {sum(heights)}.")
    ends = [sum(heights[: i + 1]) for i in range(len(heights))]
    return [
        Piece(
            name=f"{module_path(layer, part.name)}.{kind}",
            rows=slice(end - height, end),
            order=_row_order(part, config),
        )
        for part, height, end in zip(members, heights, ends, strict=True)
    ]


def _row_order(part: Part | None, config: ByteModelConfig) -> tuple[int, ...] | None:
    """The order that makes pairs (j, j + D/2) of (j, j + R/2), where R of the D channels of a head are rotated."""
    assert config.rope_parameters is not None and config.head_dim is not None  # ByteModelConfig sets both
    rotated, width = rotated_channels(config.rope_parameters, config.head_dim), config.head_dim
    if part is None or part.rotated_heads is None or rotated == width:
        return None
    middle = (rotated + width) // 2
    channels = [*range(rotated // 2), *range(rotated, middle), *range(rotated // 2, rotated), *range(middle, width)]
    return tuple(head * width + channel for head in range(part.rotated_heads(config)) for channel in channels)
