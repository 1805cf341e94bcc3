"""Parameters are counted as the model itself has them."""

import math

import pytest

from stellarbyte import ByteTransformer
from stellarbyte.analysis.parameters import GROUPS, count_groups, count_parts, parameters_of
from stellarbyte.analysis.structure import layer_kinds, layer_runs
from tests.support.models.byte_transformer import EXPERT_VARIANTS, VARIANTS, W, make_config, make_model

MODELS = VARIANTS | EXPERT_VARIANTS | {"learned decay": {"xpos_learnable_scale": True}}
WORDS = {  # in a parameter's name → its group; the first that occurs
    "norm": "norms",
    "_scale": "scales",
    "raw_decay": "scales",
    "embed_tokens": "embedding",
    "lm_head": "head",
    "shared_expert": "shared_experts",
    "mlp.experts": "experts",
    "mlp.gate.": "router",
    "mlp": "mlp",
    "self_attn": "attention",
}


def group_of(name: str) -> str:
    return next(group for word, group in WORDS.items() if word in name)


@pytest.mark.parametrize("variant", MODELS)
def test_groups_and_parts_hold_every_parameter_of_the_model_once(variant: str) -> None:
    config = make_config(**MODELS[variant])
    model = ByteTransformer(config)
    numbers = {name: parameter.numel() for name, parameter in model.named_parameters()}  # a tied head is not among them
    parameters = parameters_of(config)
    assert {one.name: one.num_elements for one in parameters} == numbers
    groups = {count.name: count for count in count_groups(parameters)}
    for group in GROUPS:
        of_group = [number for name, number in numbers.items() if group_of(name) == group]
        assert (groups[group].num_parameters if group in groups else 0) == sum(of_group)
        assert (groups[group].num_tensors if group in groups else 0) == len(of_group)
    assert math.isclose(sum(count.share for count in groups.values()), 1)
    for count in count_parts(parameters):
        ending = count.name if count.name.startswith(("model.", "lm_head")) else f".{count.name}"
        assert count.num_parameters == sum(number for name, number in numbers.items() if name.endswith(ending))


def test_stacks_of_experts_are_matrices_and_their_biases_are_not() -> None:
    config = make_config(**EXPERT_VARIANTS["experts with biases, clamped"])
    is_matrix = {one.part: one.is_matrix for one in parameters_of(config)}
    assert is_matrix["mlp.experts.gate_up_proj"] and is_matrix["self_attn.q_proj.weight"]
    assert is_matrix["model.embed_tokens.weight"] and is_matrix["mlp.gate.weight"]
    for part in ("mlp.experts.gate_up_proj_bias", "self_attn.softmax_sink", "input_layernorm.weight"):
        assert not is_matrix[part]


def test_kinds_of_layers_are_told_by_window_rotation_and_experts() -> None:
    config = make_config(
        num_hidden_layers=6,
        sliding_window=W,
        layer_types=["sliding_attention", "full_attention"] * 3,
        layer_rotations=["global", "none", "global", "none", "none", "none"],
        num_experts=4,
        moe_layers=[0, 2, 3, 5],
        expert_pools=[7, 7, 1, 1],
    )
    found = [(kind.layers, kind.window, kind.rotation, kind.holders, kind.num_pools) for kind in layer_kinds(config)]
    assert found == [
        ((0, 2), W, "global", (0, 0), 1),
        ((1,), None, "none", (), 0),
        ((3, 5), None, "none", (3, 3), 1),
        ((4,), W, "none", (), 0),
    ]


def test_layers_are_named_by_runs() -> None:
    assert layer_runs((0, 1, 2, 5, 7, 8)) == ["0–2", "5", "7–8"] and layer_runs((3,)) == ["3"]


def test_a_tied_head_has_no_parameters() -> None:
    assert "head" not in {count.name for count in count_groups(parameters_of(make_config(tie_word_embeddings=True)))}
    assert make_model(tie_word_embeddings=True).lm_head.weight is not None
