"""Options that contradict each other, or cannot be, are refused in one sentence that names the field."""

from typing import Any

import pytest
import torch

from stellarbyte import ByteTransformer
from stellarbyte.xpos import Rotation, XPosRotaryEmbedding
from tests.support.models.byte_transformer import make_config

ROPE = {"rope_type": "default", "rope_theta": 100.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"branch_norms": "between"}, "branch_norms 'between' is not one of before, after, both"),
    ({"branch_norms": "both", "deepnorm": True}, "deepnorm needs branch_norms before, got both"),
    ({"branch_norms": "after", "parallel_residual": True}, "parallel_residual needs branch_norms before, got after"),
    ({"qk_norm_per_head": False}, "qk_norm_per_head is false but qk_norm is, too"),
    ({"residual_multiplier": 0.0}, r"residual_multiplier \(0.0\) must be greater than 0"),
    ({"attention_multiplier": -1.0}, r"attention_multiplier \(-1.0\) must be greater than 0, or null"),
    ({"attention_softcap": 0}, r"attention_softcap \(0\) must be greater than 0, or null"),
    ({"layer_rotations": ["global"]}, "layer_rotations names 1 layers, num_hidden_layers is 3"),
    ({"layer_rotations": ["global", "yes", "none"]}, "layer_rotations holds 'yes'; known are global, local, none"),
    ({"layer_rotations": ["local"] * 3}, "local_rope_parameters and local layers"),
    ({"local_rope_parameters": ROPE}, "local_rope_parameters and local layers"),
    (
        {"layer_rotations": ["local"] * 3, "local_rope_parameters": {"rope_type": "default"}},
        "local_rope_parameters: rope_type default needs rope_theta greater than 0, got None",
    ),
    ({"rope_parameters": ROPE | {"partial_rotary_factor": 0.2}}, "partial_rotary_factor 0.2 of 16 channels is not an"),
    ({"rope_parameters": ROPE | {"partial_rotary_factor": 1.5}}, "partial_rotary_factor 1.5 of 16 channels is not an"),
    (
        {"rope_parameters": LONGROPE | {"short_factor": [1.0] * 8, "long_factor": [1.0] * 7}},
        "long_factor must be a list of 8 numbers greater than 0",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_layers_with_one_rotation_share_its_tables() -> None:
    rotary = XPosRotaryEmbedding(
        make_config(
            num_hidden_layers=4, layer_rotations=["local", "global", "none", "local"], local_rope_parameters=ROPE
        )
    )
    kinds: list[Rotation] = [rotary.of_layer(layer, 100) for layer in range(4)]
    assert kinds[0] is kinds[3] and len({id(kind) for kind in kinds}) == 3


def test_only_the_rotated_part_of_a_head_takes_longropes_attention_factor() -> None:
    """Phi-4-mini: a score is factor² times the product of the rotated parts, plus the product of the others."""
    rope = LONGROPE | {
        "partial_rotary_factor": 0.5, "attention_factor": 1.2, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    }  # fmt: skip
    rotation = XPosRotaryEmbedding(make_config(use_xpos=False, rope_parameters=rope)).of_layer(0, 64)
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([0])
    score = (rotation.rotate_queries(q, at, 1) * rotation.rotate_keys(k, at, 1)).sum() * rotation.score_scale
    rotated = [0, 1, 2, 3, 8, 9, 10, 11]
    kept = [4, 5, 6, 7, 12, 13, 14, 15]
    expected = (1.44 * (q * k)[..., rotated].sum() + (q * k)[..., kept].sum()) / 4
    torch.testing.assert_close(score, expected)


def test_a_new_model_starts_with_norms_that_multiply_by_one() -> None:
    decoder = ByteTransformer(make_config(zero_centered_norms=True, branch_norms="both")).model
    norms = [decoder.norm, *(module for name, module in decoder.layers[1].named_modules() if "norm" in name)]
    assert len(norms) == 5 and all(torch.equal(norm.gain, torch.ones(48)) for norm in norms)
