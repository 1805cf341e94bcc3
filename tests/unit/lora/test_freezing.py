"""Which parameters train after patterns froze or unfroze them."""

import re

import pytest
import torch
from torch import nn

from stellarbyte import ByteTransformer
from stellarbyte.lora import (
    LoRAConfig,
    activate_lora,
    apply_lora_to_model,
    freeze,
    load_adapter,
    save_adapter,
    unfreeze,
)
from tests.support.models.byte_transformer import make_model, random_tokens

TOKENS = torch.tensor([random_tokens(12)])


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def changed_by_training(model: nn.Module) -> set[str]:
    """The parameters that two steps of an optimizer of all parameters change."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # A has no gradient while B is zero
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize(
    ("pattern", "expression"),
    [
        ("embed_tokens", r"model\.embed_tokens\..*"),
        (r"layers\.[01]", r"model\.layers\.[01]\..*"),
        ("q_proj|k_proj", r".*\.(q|k)_proj\..*"),
        ("bias", r".*\.bias"),
        ("self_attn.q_proj.weight", r".*\.self_attn\.q_proj\.weight"),
        (".*norm", r".*norm\..*"),
        ("layers.1", r"model\.layers\.1\..*"),
    ],
)
def test_a_pattern_means_parameters_and_whole_modules(pattern: str, expression: str) -> None:
    model = make_model(attention_bias=True)
    names = {name for name, _ in model.named_parameters()}
    expected = {name for name in names if re.fullmatch(expression, name)}
    assert 0 < len(expected) < len(names)
    assert set(freeze(model, [pattern])) == expected
    assert trainable(model) == names - expected == changed_by_training(model)
    assert set(unfreeze(model, [pattern])) == expected
    assert trainable(model) == names


def test_beside_an_adapter_norms_train_and_a_frozen_a_stays_frozen() -> None:
    """Zhang et al. 2023 (LoRA-FA) train B alone."""
    model = apply_lora_to_model(make_model(), LoRAConfig(r=4))
    unfreeze(model, ["input_layernorm"])
    freeze(model, ["lora_A"])
    b = {name for name, _ in model.named_parameters() if ".lora_B." in name}
    norms = {f"model.layers.{layer}.input_layernorm.weight" for layer in range(3)}
    assert trainable(model) == b | norms == changed_by_training(model)
    apply_lora_to_model(model, LoRAConfig(r=4), "other")
    activate_lora(model, "default")
    assert trainable(model) == b


def test_names_are_those_without_lora() -> None:
    model = apply_lora_to_model(make_model(), LoRAConfig(r=4))
    assert unfreeze(model, ["layers.0.self_attn.q_proj.weight"]) == ("model.layers.0.self_attn.q_proj.weight",)
    assert "model.layers.0.self_attn.q_proj.base_layer.weight" in trainable(model)


def test_a_loaded_adapter_trains_once_it_is_unfrozen(tmp_path) -> None:
    save_adapter(apply_lora_to_model(make_model(), LoRAConfig(r=4)), tmp_path)
    model = load_adapter(make_model(), tmp_path)
    lora = {name for name, _ in model.named_parameters() if ".lora_" in name}
    freeze(model, ["model", "lm_head"])
    unfreeze(model, ["lora_A", "lora_B"])
    activate_lora(model, "default")
    assert trainable(model) == lora == changed_by_training(model)


def test_tied_weights_freeze_together() -> None:
    model = make_model(tie_word_embeddings=True)
    freeze(model, ["lm_head"])
    assert not model.model.embed_tokens.weight.requires_grad


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["norm", "attention.q"], "pattern 'attention.q' matches no parameter and no module of the model"),
        (["norm", "proj"], "pattern 'proj' matches no"),  # not an end after a dot
        (["norm", "(("], r"pattern '\(\(' is not a valid regular expression"),
        ("norm", "patterns .'norm'. must be a list"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_and_changes_nothing(patterns: list[str] | str, said: str) -> None:
    model: ByteTransformer = make_model()
    before = trainable(model)
    for change in (freeze, unfreeze):
        with pytest.raises(ValueError, match=said):
            change(model, patterns)
        assert trainable(model) == before
