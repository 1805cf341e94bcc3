"""What families become: options and tensors of the converted model; what cannot be converted is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stellarbyte.checkpoint.convert import convert, make_plan
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.native import load_model
from tests.support.models.families import FAMILIES, tiny_family


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_numbers_are_stored_bit_by_bit(tmp_path: Path) -> None:
    """Nothing is folded into weights, where bfloat16 would round it: norms of 1 + weight keep the weight."""
    for name in ("gemma2", "granite", "phi3 longrope"):
        source = tiny_family(tmp_path / f"source {name}", name, dtype=torch.bfloat16)
        target = convert(source, tmp_path / f"target {name}")
        before, after = (load_file(folder / "model.safetensors") for folder in (source, target))
        numbers = [
            torch.cat([t.flatten() for t in tensors.values()]).float().sort().values for tensors in (before, after)
        ]
        assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
        assert torch.equal(*numbers)


def test_a_fused_projection_is_split_and_pairs_lie_half_a_head_apart(tmp_path: Path) -> None:
    source = tiny_family(tmp_path / "source", "phi3 longrope")
    fused = load_file(source / "model.safetensors")["model.layers.1.self_attn.qkv_proj.weight"]
    tensors = make_plan(source).tensors
    q, k, v = (tensors[f"model.layers.1.self_attn.{name}_proj.weight"].read() for name in "qkv")
    # 12 of a head's 16 channels are rotated: 0 with 6, 1 with 7 ...; those of 12..15 are not.
    channels = [0, 1, 2, 3, 4, 5, 12, 13, 6, 7, 8, 9, 10, 11, 14, 15]
    rows = [16 * head + channel for head in range(6) for channel in channels]
    assert torch.equal(torch.cat([q, k]), fused[rows]) and torch.equal(v, fused[96:])


def test_gemmas_choice_of_a_cache_is_left_out(tmp_path: Path) -> None:
    """Its generation_config.json names a cache of transformers', which `generate` here would refuse."""
    source = tiny_family(tmp_path / "source", "gemma2")
    file = source / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cache_implementation": "hybrid", "top_k": 7}))
    model = load_model(convert(source, tmp_path / "target"))
    assert model.generation_config.top_k == 7
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False, eos_token_id=None).shape == (1, 4)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "both directions": (
        "gemma2",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention is not supported",
    ),
    "both directions, Gemma 3": (
        "gemma3",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention is not supported",
    ),
    "Gemma with images": ("gemma3", {"model_type": "gemma3"}, "holds a model of type 'gemma3'"),
    "Cohere": ("granite", {"model_type": "cohere"}, "holds a model of type 'cohere'"),
    "Ministral 3": ("ministral", {"model_type": "ministral3"}, "holds a model of type 'ministral3'"),
    "a fused linear of another height": (
        "phi3",
        {"num_key_value_heads": 1},
        "qkv_proj.weight has 128 rows; the config implies 96",
    ),
    "longrope's factors of another length": (
        "phi3 longrope",
        {"num_attention_heads": 2, "num_key_value_heads": 1},
        "short_factor",
    ),
    "no such activation": ("gemma2", {"hidden_activation": "relu"}, "hidden_act 'relu' is not supported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_by_name(name: str, tmp_path: Path) -> None:
    family, changes, message = REFUSED[name]
    source = tiny_family(tmp_path / "source", family)
    edit_config(source, **changes)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "target")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "target").exists()


def test_every_family_is_in_the_documented_table() -> None:
    page = (Path(__file__).parents[4] / "docs" / "models.md").read_text(encoding="utf-8")
    for _, model_class, _ in FAMILIES.values():
        assert f"| `{model_class.__name__}` |" in page
