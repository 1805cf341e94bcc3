"""Architectures of GGUF files that are Llama with other options, and the metadata in which these are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Metadata = Mapping[str, Any]  # of the architecture, without its name

GPT_OSS_SWIGLU = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}  # llama.cpp knows them, files do not say them
SMOLLM3_STEP = 4  # every fourth layer does not rotate; llama.cpp knows it, files do not say it


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture.

    Attributes:
        is_interleaved: whether rows of q and k are stored for the rotation of neighbouring channels.
        options: the fields of ByteModelConfig that differ from Llama's, from the metadata and the number of layers.
        factors: the metadata among `model.CHANGES_THE_MODEL` that `options` reads.
        renamed: modules of a layer that have another name than the table of parts gives them.
        rope: `rope_parameters` that files do not say.
    """

    is_interleaved: bool
    options: Callable[[Metadata, int], dict[str, Any]] = lambda *_: {}
    factors: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    rope: Mapping[str, Any] = field(default_factory=dict)


def _granite(metadata: Metadata, _num_layers: int) -> dict[str, Any]:
    return {
        "embedding_multiplier": metadata.get("embedding_scale") or 1.0,
        "attention_multiplier": metadata.get("attention.scale") or None,
        "residual_multiplier": metadata.get("residual_scale") or 1.0,
        "logits_multiplier": 1 / (metadata.get("logit_scale") or 1.0),
    }


def _smollm3(_metadata: Metadata, num_layers: int) -> dict[str, Any]:
    return {"layer_rotations": ["none" if (i + 1) % SMOLLM3_STEP == 0 else "global" for i in range(num_layers)]}


def _gpt_oss(metadata: Metadata, num_layers: int) -> dict[str, Any]:
    options: dict[str, Any] = {"softmax_sink": True, "router_bias": True, "expert_bias": True, **GPT_OSS_SWIGLU}
    if 0 < metadata.get("attention.sliding_window", 0) < metadata["context_length"]:
        options["layer_types"] = ["full_attention" if i % 2 else "sliding_attention" for i in range(num_layers)]
    return options


def _olmo2(_metadata: Metadata, _num_layers: int) -> dict[str, Any]:
    return {"branch_norms": "after", "qk_norm": True, "qk_norm_per_head": False}


FAMILIES: Mapping[str, Family] = {
    "llama": Family(is_interleaved=True),
    "qwen2": Family(is_interleaved=False),
    "qwen3": Family(is_interleaved=False, options=lambda *_: {"qk_norm": True}),
    "granite": Family(
        is_interleaved=True,
        options=_granite,
        factors=("attention.scale", "logit_scale", "residual_scale", "embedding_scale"),
    ),
    "smollm3": Family(is_interleaved=True, options=_smollm3),
    "olmo2": Family(is_interleaved=False, options=_olmo2),
    "qwen2moe": Family(is_interleaved=False),
    "qwen3moe": Family(is_interleaved=False, options=lambda *_: {"qk_norm": True}),
    "gpt-oss": Family(
        is_interleaved=False,
        options=_gpt_oss,
        renamed={"post_attention_norm": "ffn_norm"},
        rope={"truncate": False},  # as OpenAI's model; llama.cpp itself rounds the bounds of YaRN
    ),
    "olmoe": Family(is_interleaved=False, options=lambda *_: {"qk_norm": True, "qk_norm_per_head": False}),
}
