"""Adapters inside a model: what they add, what they leave alone, and that everything can be taken back."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from stellarbyte import ByteTransformer
from stellarbyte.lora import (
    LoRAConfig,
    LoRALayer,
    activate_lora,
    apply_lora_to_model,
    deactivate_lora,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from tests.support.models.byte_transformer import make_model, random_tokens

TOKENS = torch.tensor([random_tokens(12)])
Q_V = LoRAConfig(r=4, lora_alpha=8)
DOWN = LoRAConfig(r=2, lora_alpha=6, target_modules=["down_proj", "q_proj"])


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def fill(model: nn.Module, seed: int = 1) -> None:
    """Random numbers in every B, so that adapters change something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1, generator=generator)


def adapted_model(**overrides: object) -> ByteTransformer:
    """A model with the adapters "a" and "b", of which "b" is active."""
    model = make_model(**overrides)
    apply_lora_to_model(model, Q_V, "a")
    apply_lora_to_model(model, DOWN, "b")
    fill(model)
    return model.eval()


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in model.state_dict().items()}


def reference_logits(model: ByteTransformer, *names: str) -> torch.Tensor:
    """The same model without any wrapper: W + scale · B A written into the weights by hand."""
    plain = make_model()
    for module_name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            weight = plain.get_submodule(module_name).weight
            for name in names:
                if name in module.lora_A:
                    update = module.lora_B[name].weight @ module.lora_A[name].weight
                    weight.data += {"a": 2.0, "b": 3.0}[name] * update
    return logits(plain)


@pytest.mark.parametrize("names", [("a",), ("b",), ("a", "b")])
def test_active_adapters_are_added_up(names: tuple[str, ...]) -> None:
    model = adapted_model()
    activate_lora(model, *names)
    expected = reference_logits(model, *names)
    assert (expected - logits(make_model())).abs().max() > 0.1
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_a_new_adapter_changes_nothing_and_names_its_parameters_as_peft_does() -> None:
    model = make_model()
    before = logits(model)
    assert apply_lora_to_model(model, Q_V) is model
    assert torch.equal(logits(model), before)
    names = {name for name in model.state_dict() if "lora" in name}
    assert names == {
        f"model.layers.{layer}.self_attn.{projection}.lora_{letter}.default.weight"
        for layer in range(3)
        for projection in ("q_proj", "v_proj")
        for letter in "AB"
    }


def test_only_the_active_adapters_are_trainable() -> None:
    model = adapted_model()

    def trainable() -> set[str]:
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(".lora_" in name for name in names)
        return {name.split(".")[-2] for name in names}

    assert trainable() == {"b"}
    activate_lora(model, "a")
    assert trainable() == {"a"}
    activate_lora(model, "a", "b")
    assert trainable() == {"a", "b"}


def test_applying_the_same_name_again_keeps_the_weights_and_activates_it() -> None:
    model = adapted_model()
    activate_lora(model, "a")
    expected = logits(model)
    activate_lora(model, "b")
    apply_lora_to_model(model, LoRAConfig(r=2, target_modules=["q_proj", "v_proj"]), "a")
    assert torch.equal(logits(model), expected)


def test_all_linear_leaves_the_output_head_alone() -> None:
    model = apply_lora_to_model(make_model(), LoRAConfig(target_modules="all-linear"))
    wrapped = {name for name, module in model.named_modules() if isinstance(module, LoRALayer)}
    linear = {name for name, module in make_model().named_modules() if isinstance(module, nn.Linear)}
    assert wrapped == linear - {"lm_head"} and len(wrapped) == 21


def test_deactivating_restores_the_same_objects() -> None:
    plain = make_model()
    objects, keys, expected = dict(plain.named_modules()), list(plain.state_dict()), logits(plain)
    apply_lora_to_model(plain, Q_V)
    fill(plain)
    adapted = logits(plain)
    for _ in range(2):  # the second time changes nothing
        deactivate_lora(plain)
        assert dict(plain.named_modules()) == objects and list(plain.state_dict()) == keys
        assert torch.equal(logits(plain), expected)
    activate_lora(plain, "default")
    assert torch.equal(logits(plain), adapted)


def test_adapters_kept_aside_follow_the_model_when_they_come_back() -> None:
    model = adapted_model()
    deactivate_lora(model)
    copied = copy.deepcopy(model).train()
    activate_lora(copied, "b")
    assert all(layer.training for layer in copied.modules())
    assert torch.equal(logits(copied.eval()), logits(activate(model, "b")))


def activate(model: ByteTransformer, *names: str) -> ByteTransformer:
    activate_lora(model, *names)
    return model


def test_applying_while_deactivated_keeps_the_others() -> None:
    model = adapted_model()
    expected = logits(model)
    deactivate_lora(model)
    apply_lora_to_model(model, Q_V, "c")
    assert torch.equal(logits(model), logits(make_model()))
    assert torch.equal(logits(activate(model, "b", "c")), expected)


@pytest.mark.parametrize("aside", [False, True])
def test_removing_the_last_adapter_returns_the_original_layer(aside: bool) -> None:
    model = adapted_model()
    objects = {name: m.base_layer for name, m in model.named_modules() if isinstance(m, LoRALayer)}
    activate_lora(model, "a")
    expected = logits(model)
    if aside:
        deactivate_lora(model)
    remove_lora(model, "b")
    if aside:
        activate_lora(model, "a")
    assert torch.equal(logits(model), expected)
    assert model.get_submodule("model.layers.0.mlp.down_proj") is objects["model.layers.0.mlp.down_proj"]
    remove_lora(model, "a")
    assert all(model.get_submodule(name) is layer for name, layer in objects.items())
    assert list(model.state_dict()) == list(make_model().state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_is_undone_bit_for_bit(dtype: torch.dtype) -> None:
    model = activate(adapted_model().to(dtype), "a", "b")
    before, expected = bits(model), logits(model)
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    unmerge_lora(model)  # nothing is merged: nothing happens
    merge_lora(model)
    merged = bits(model)
    merge_lora(model)
    assert bits(model) == merged != before
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float16: 0.05}[dtype]
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=tolerance)
    unmerge_lora(model)
    unmerge_lora(model)
    assert bits(model) == before and torch.equal(logits(model), expected)
    assert pointers == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_a_merge_in_bfloat16_rounds_once() -> None:
    """Three adapters, each smaller than a step of bfloat16 at 1: their sum counts, summed in float32."""
    layer = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    layer.weight.data.fill_(1.0)
    model = nn.Sequential(layer)
    for name in "xyz":
        apply_lora_to_model(model, LoRAConfig(r=1, lora_alpha=1, target_modules=["0"]), name)
        model[0].lora_A[name].weight.data.fill_(2**-9)
        model[0].lora_B[name].weight.data.fill_(1.0)
    activate_lora(model, "x", "y", "z")
    merge_lora(model)
    assert model[0].base_layer.weight.item() == 1 + 2**-7


def test_a_merge_does_not_touch_tied_embeddings() -> None:
    model = make_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    embeddings = model.model.embed_tokens.weight.clone()
    apply_lora_to_model(model, LoRAConfig(target_modules=["lm_head"]))
    fill(model)
    expected = logits(model)
    merge_lora(model)
    assert torch.equal(model.model.embed_tokens.weight, embeddings)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    unmerge_lora(model)
    assert model.lm_head.base_layer.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "change",
    [
        lambda model: activate_lora(model, "a"),
        deactivate_lora,
        lambda model: remove_lora(model, "b"),
        lambda model: apply_lora_to_model(model, Q_V, "c"),
    ],
)
def test_whatever_changes_adapters_unmerges_first(change) -> None:
    merged, other = adapted_model(), adapted_model()
    merge_lora(merged)
    change(merged)
    change(other)
    assert torch.equal(logits(merged), logits(other))
    base = {name.replace(".base_layer", ""): tensor for name, tensor in merged.state_dict().items()}
    assert all(torch.equal(base[name], tensor) for name, tensor in make_model().state_dict().items())


def test_merged_models_are_copied_and_moved_whole() -> None:
    model = adapted_model()
    merge_lora(model)
    copied = copy.deepcopy(model).to(torch.float64)
    unmerge_lora(copied)
    unmerge_lora(model)
    torch.testing.assert_close(logits(copied), logits(model.to(torch.float64)), rtol=0, atol=1e-9)


def test_dropout_acts_in_training_only() -> None:
    model = apply_lora_to_model(make_model(), LoRAConfig(lora_dropout=0.5))
    fill(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    merge_lora(model.eval())
    assert torch.equal(logits(model.train()), logits(model))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_changes_only_the_active_adapter_and_lowers_the_loss(checkpointing: bool) -> None:
    model = make_model()
    apply_lora_to_model(model, Q_V, "idle")
    apply_lora_to_model(model, LoRAConfig(r=4, target_modules="all-linear", lora_dropout=0.05))
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".default." in name}


def test_state_dicts_carry_adapters() -> None:
    model, stream = adapted_model(), io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    other = make_model(seed=1)
    apply_lora_to_model(other, Q_V, "a")
    apply_lora_to_model(other, DOWN, "b")
    other.load_state_dict(torch.load(stream))
    assert torch.equal(logits(other), logits(model))


def test_conv1d_stores_weights_the_other_way_round() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_positions=32, n_embd=24, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ).eval()
    config = LoRAConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    with pytest.raises(ValueError, match=r"^fan_in_fan_out must be True: transformer.h.0.attn.c_attn is a Conv1D"):
        apply_lora_to_model(model, LoRAConfig(target_modules=["c_attn"]))
    assert not any(isinstance(module, LoRALayer) for module in model.modules())
    apply_lora_to_model(model, config)
    fill(model)
    layer, x = model.transformer.h[1].mlp.c_proj, torch.randn(3, 96)
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    base = layer.base_layer
    torch.testing.assert_close(layer(x), F.linear(x, base.weight.T + 4 * update, base.bias))
    expected = logits(model)
    merge_lora(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_in_float32_works_on_a_bfloat16_base_and_under_autocast() -> None:
    model = adapted_model().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    assert logits(model).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(adapted_model()).isfinite().all()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda model: apply_lora_to_model(model, LoRAConfig(target_modules=["x"])),
            r"target_modules \['x'\] match no",
        ),
        (lambda model: apply_lora_to_model(model, LoRAConfig(target_modules="proj")), "target_modules 'proj' match no"),
        (lambda model: apply_lora_to_model(model, LoRAConfig(fan_in_fan_out=True)), "fan_in_fan_out must be False"),
        (lambda model: apply_lora_to_model(model, Q_V, "a.b"), "adapter name 'a.b' must not"),
        (lambda model: apply_lora_to_model(model, Q_V, "keys"), "adapter name 'keys' must not"),
        (lambda model: activate_lora(model, "a", "c"), "no adapter 'c'; it has 'a', 'b'"),
        (activate_lora, "needs the name of at least one"),
        (lambda model: remove_lora(model, "c"), "no adapter 'c'; it has 'a', 'b'"),
        (lambda _: remove_lora(make_model(), "c"), "no adapter 'c'; it has none"),
    ],
)
def test_refusals_leave_the_model_as_it_was(call, said: str) -> None:
    model = adapted_model()
    merge_lora(model)
    before = bits(model)
    with pytest.raises(ValueError, match=said):
        call(model)
    assert bits(model) == before
