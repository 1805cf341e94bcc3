"""Options of experts that cannot be: each is refused by its name."""

from typing import Any

import pytest

from stellarbyte.config import ByteModelConfig
from stellarbyte.expert_options import OPTIONS
from tests.support.models.byte_transformer import make_config

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_experts_per_tok": 7}, r"num_experts_per_tok \(7\) must be from 1 to num_experts \(6\)"),
    ({"num_experts_per_tok": 0}, r"num_experts_per_tok \(0\) must be"),
    ({"moe_intermediate_size": 0}, r"moe_intermediate_size \(0\) must be at least 1"),
    ({"moe_layers": []}, r"moe_layers \(\[\]\) must be ascending numbers of layers from 0 to 2"),
    ({"moe_layers": [1, 0]}, r"moe_layers \(\[1, 0\]\) must be ascending"),
    ({"moe_layers": [1, 1]}, r"moe_layers \(\[1, 1\]\) must be ascending"),
    ({"moe_layers": [3]}, r"moe_layers \(\[3\]\) must be ascending"),
    ({"expert_pools": [0, 0]}, "expert_pools names the pools of 2 layers, but 3 layers have experts"),
    ({"moe_layers": [0], "expert_pools": [0, 0]}, "but 1 layers have experts"),
    ({"shared_expert_intermediate_size": -1}, r"shared_expert_intermediate_size \(-1\) must be at least 0"),
    ({"swiglu_limit": 7.0}, "swiglu_limit and swiglu_alpha need each other"),
    ({"swiglu_alpha": 1.7}, "swiglu_limit and swiglu_alpha need each other"),
    ({"swiglu_limit": 0.0, "swiglu_alpha": 1.7}, r"swiglu_limit \(0.0\) must be greater than 0, or null"),
    ({"swiglu_limit": 7.0, "swiglu_alpha": -1.0}, r"swiglu_alpha \(-1.0\) must be greater than 0, or null"),
    ({"swiglu_limit": 7.0, "swiglu_alpha": 1.7, "hidden_act": "gelu"}, "swiglu_limit needs hidden_act silu, got gelu"),
    ({"shared_expert_gate": True}, "shared_expert_gate needs shared_expert_intermediate_size"),
    ({"router_score": "tanh"}, "router_score 'tanh' is not one of softmax, sigmoid"),
    ({"router_noise": "white"}, "router_noise 'white' is not one of none, noisy_top_k, gumbel"),
    ({"router_top_p": 0}, r"router_top_p \(0\) must be greater than 0 and at most 1"),
    ({"router_top_p": 0.5, "router_top_p_start": 1.5, "router_top_p_steps": 1}, r"router_top_p_start \(1.5\) must be"),
    ({"router_top_p": 0.5, "router_top_p_start": 0.5}, "router_top_p_start needs router_top_p_steps"),
    ({"router_top_p": 0.5, "router_top_p_steps": 5}, "router_top_p_start needs router_top_p_steps"),
    ({"min_experts_per_tok": 2}, "min_experts_per_tok need router_top_p"),
    ({"router_top_p": 0.5, "min_experts_per_tok": 3}, r"min_experts_per_tok \(3\) must be from 1 to num_experts_per"),
    ({"router_noise": "noisy_top_k", "router_selection_bias": True}, "noisy_top_k excludes"),
    ({"router_noise": "noisy_top_k", "router_top_p": 0.5}, "noisy_top_k excludes"),
    ({"capacity_factor": 0.0}, r"capacity_factor \(0.0\) must be greater than 0"),
    ({"router_z_coef": -0.1}, r"router_z_coef \(-0.1\) must be at least 0"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_impossible_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**({"num_experts": 6} | options))


OTHER_VALUES = {
    "num_experts_per_tok": 3, "moe_intermediate_size": 8, "moe_layers": [0], "expert_pools": [0, 0, 0],
    "expert_bias": True, "swiglu_limit": 7.0, "swiglu_alpha": 1.702,
    "shared_expert_intermediate_size": 8, "shared_expert_gate": True, "router_score": "sigmoid",
    "norm_topk_prob": False, "router_bias": True, "router_selection_bias": True, "router_top_p": 0.5,
    "min_experts_per_tok": 2, "router_top_p_start": 0.5, "router_top_p_steps": 5, "router_noise": "gumbel",
    "router_noise_scale": 0.5, "capacity_factor": 1.0, "router_balance_coef": 0.1, "router_z_coef": 0.1,
    "router_entropy_coef": 0.1, "router_load_coef": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_no_option_is_ignored_without_experts(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} .* needs num_experts greater than 0"):
        make_config(**{name: OTHER_VALUES[name]})


def test_experts_are_a_number() -> None:
    with pytest.raises(ValueError, match=r"num_experts \(-1\) must be at least 0"):
        make_config(num_experts=-1)


def test_layers_know_who_holds_their_experts(tmp_path) -> None:
    config = make_config(num_experts=4, num_hidden_layers=6, moe_layers=[1, 2, 3, 5], expert_pools=[7, 3, 7, 3])
    assert config.expert_layers == (None, 1, 2, 1, None, 2)
    config.save_pretrained(tmp_path)
    assert ByteModelConfig.from_pretrained(tmp_path).expert_layers == config.expert_layers
    assert make_config(num_experts=4).moe_intermediate_size == make_config().intermediate_size
