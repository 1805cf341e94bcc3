"""The checks of a configuration's options for mixtures of experts."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stellarbyte.config import ByteModelConfig

ROUTER_SCORES = ("softmax", "sigmoid")
ROUTER_NOISES = ("none", "noisy_top_k", "gumbel")
FACTORS = ("router_noise_scale", "router_balance_coef", "router_z_coef", "router_entropy_coef", "router_load_coef")
OPTIONS = frozenset(
    {"expert_bias", "swiglu_limit", "swiglu_alpha"}
    | {"num_experts_per_tok", "moe_intermediate_size", "moe_layers", "expert_pools", "shared_expert_intermediate_size"}
    | {"shared_expert_gate", "router_score", "norm_topk_prob", "router_bias", "router_selection_bias", "router_top_p"}
    | {"min_experts_per_tok", "router_top_p_start", "router_top_p_steps", "router_noise", "capacity_factor", *FACTORS}
)


def check_experts(config: "ByteModelConfig") -> None:
    """Raise ValueError where options of experts are impossible, contradict each other, or would not be used."""
    if config.num_experts < 0:
        raise ValueError(f"num_experts ({config.num_experts}) must be at least 0")
    if config.num_experts == 0:
        for field in dataclasses.fields(config):
            if field.name in OPTIONS and getattr(config, field.name) != field.default:
                raise ValueError(f"{field.name} ({getattr(config, field.name)}) needs num_experts greater than 0")
        return
    _check_layers(config)
    _check_sizes(config)
    _check_swiglu(config)
    _check_choice(config)
    _check_training(config)


def _check_layers(config: "ByteModelConfig") -> None:
    layers, count = config.moe_layers, config.num_hidden_layers
    if layers is not None and not (layers and layers == sorted({*layers} & {*range(count)})):
        raise ValueError(f"moe_layers ({layers}) must be ascending numbers of layers from 0 to {count - 1}, or null")
    num_moe_layers = count if layers is None else len(layers)
    if config.expert_pools is not None and len(config.expert_pools) != num_moe_layers:
        raise ValueError(
            f"expert_pools names the pools of {len(config.expert_pools)} layers, but {num_moe_layers} layers have "
            "experts"
        )


def _check_sizes(config: "ByteModelConfig") -> None:
    assert config.moe_intermediate_size is not None  # ByteModelConfig sets it
    if config.moe_intermediate_size < 1:
        raise ValueError(f"moe_intermediate_size ({config.moe_intermediate_size}) must be at least 1")
    if not 1 <= config.num_experts_per_tok <= config.num_experts:
        raise ValueError(
            f"num_experts_per_tok ({config.num_experts_per_tok}) must be from 1 to num_experts ({config.num_experts})"
        )
    if config.shared_expert_intermediate_size < 0:
        raise ValueError(
            f"shared_expert_intermediate_size ({config.shared_expert_intermediate_size}) must be at least 0"
        )
    if config.shared_expert_gate and not config.shared_expert_intermediate_size:
        raise ValueError("shared_expert_gate needs shared_expert_intermediate_size greater than 0")


def _check_swiglu(config: "ByteModelConfig") -> None:
    if (config.swiglu_limit is None) != (config.swiglu_alpha is None):
        raise ValueError("swiglu_limit and swiglu_alpha need each other")
    for name in ("swiglu_limit", "swiglu_alpha"):
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            raise ValueError(f"{name} ({getattr(config, name)}) must be greater than 0, or null")
    if config.swiglu_limit is not None and config.hidden_act != "silu":
        raise ValueError(f"swiglu_limit needs hidden_act silu, got {config.hidden_act}")


def _check_choice(config: "ByteModelConfig") -> None:
    if config.router_score not in ROUTER_SCORES:
        raise ValueError(f"router_score {config.router_score!r} is not one of {', '.join(ROUTER_SCORES)}")
    for name in ("router_top_p", "router_top_p_start"):
        share = getattr(config, name)
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"{name} ({share}) must be greater than 0 and at most 1, or null")
    if config.router_top_p is None and (config.router_top_p_start is not None or config.min_experts_per_tok != 1):
        raise ValueError("router_top_p_start and min_experts_per_tok need router_top_p")
    if not 1 <= config.min_experts_per_tok <= config.num_experts_per_tok:
        raise ValueError(
            f"min_experts_per_tok ({config.min_experts_per_tok}) must be from 1 to num_experts_per_tok "
            f"({config.num_experts_per_tok})"
        )
    if config.router_top_p_steps < 0 or (config.router_top_p_start is None) != (config.router_top_p_steps == 0):
        raise ValueError("router_top_p_start needs router_top_p_steps greater than 0, and the other way round")


def _check_training(config: "ByteModelConfig") -> None:
    if config.router_noise not in ROUTER_NOISES:
        raise ValueError(f"router_noise {config.router_noise!r} is not one of {', '.join(ROUTER_NOISES)}")
    if config.router_noise == "noisy_top_k" and (config.router_top_p is not None or config.router_selection_bias):
        raise ValueError("router_noise noisy_top_k excludes router_top_p and router_selection_bias")
    if config.capacity_factor is not None and not config.capacity_factor > 0:
        raise ValueError(f"capacity_factor ({config.capacity_factor}) must be greater than 0, or null")
    for name in FACTORS:
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} ({getattr(config, name)}) must be at least 0")
