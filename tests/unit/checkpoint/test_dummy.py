"""Random weights: a folder needs only its config.json, and the model has the shape that the config says."""

import json
from functools import partial

import pytest
import torch

from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.dummy import dummy_config, dummy_hash, dummy_language_model
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.native import load_config
from tests.support.models.byte_transformer import make_config, make_model
from tests.support.models.families import tiny_family
from tests.support.models.hugging_face import (
    tiny_llama,
    tiny_mistral,
    tiny_mixtral,
    tiny_olmoe,
    tiny_qwen2,
    tiny_qwen2_moe,
    tiny_qwen3,
    tiny_qwen3_moe,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True, "qk_norm": True, "attention_bias": True},
        {"layer_scale_init": 0.25, "parallel_residual": True, "xpos_learnable_scale": True},
        {"num_experts": 6, "moe_layers": [0, 2], "shared_expert_intermediate_size": 40, "moe_intermediate_size": 40},
    ],
)
def test_the_weights_are_those_of_a_model_that_was_just_made(overrides):
    """Same names, shapes and kinds of numbers as the trainable model starts with, so that nothing overflows."""
    config = make_config(vocab_size=5000, **overrides)
    model = dummy_language_model(config, dtype=torch.float32, device=CPU)
    fresh = dict(make_model(vocab_size=5000, **overrides).named_parameters())
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert (embedding.data_ptr() == head.data_ptr()) == config.tie_word_embeddings
    fresh.setdefault("lm_head.weight", fresh["model.embed_tokens.weight"])
    for name, weight in model.named_parameters():
        expected = fresh.pop(name)
        assert (weight.shape, weight.dtype, weight.requires_grad) == (expected.shape, torch.float32, False)
        if name.endswith("norm.weight"):
            assert bool((weight == 1).all())
        elif name.endswith("_scale.weight"):
            assert bool((weight == 0.25).all())
        elif name.endswith("raw_decay"):
            torch.testing.assert_close(weight, expected)
        elif weight.numel() > 1000:
            assert abs(float(weight.mean())) < 0.05 and 0.15 < float(weight.std()) < 0.25  # initializer_range is 0.2
    assert not fresh
    again = dummy_language_model(config, dtype=torch.float32, device=CPU)
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    "make",
    [
        *(tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3),
        *(tiny_mixtral, tiny_qwen2_moe, tiny_qwen3_moe, tiny_olmoe, partial(tiny_family, name="gpt_oss")),
    ],
)
def test_a_hugging_face_config_alone_gives_the_model_that_its_conversion_would(tmp_path, make):
    source = make(tmp_path / "source")
    converted = load_config(convert(source, tmp_path / "converted"))
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((source / "config.json").read_bytes())
    of_files = {"dtype": None, "architectures": None}
    assert dummy_config(alone).to_dict() | of_files == converted.to_dict() | of_files


def test_the_hash_says_that_the_weights_are_random_and_which_config_they_are_of(tmp_path):
    hashes = set()
    for layers in (2, 3):
        make_config(num_hidden_layers=layers).save_pretrained(tmp_path)
        assert dummy_config(tmp_path).num_hidden_layers == layers
        hashes |= {dummy_hash(tmp_path), dummy_hash(tmp_path)}
    assert len(hashes) == 2 and all(value.startswith("dummy-") for value in hashes)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "has no config.json"),
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"model_type": "llama", "head_dim": "x"}, "head_dim"),
    ],
)
def test_a_folder_that_describes_no_model_is_refused_by_name(tmp_path, content, why):
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=why) as refusal:
        dummy_config(tmp_path)
    assert str(tmp_path) in str(refusal.value)
