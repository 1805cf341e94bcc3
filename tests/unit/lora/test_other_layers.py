"""Convolutions, quantized bases and non-linear adapters, against PEFT and formulas in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

from stellarbyte import ByteTransformer
from stellarbyte.lora import (
    AdapterError,
    LoRAConfig,
    activate_lora,
    apply_lora_to_model,
    deactivate_lora,
    load_adapter,
    merge_lora,
    quantize_frozen,
    read_adapter,
    save_adapter,
    unmerge_lora,
)
from stellarbyte.lora.adapted_model import adapter_layers
from stellarbyte.lora.quantized_base import GROUP, FrozenInt8Linear
from stellarbyte.model.parts import adaptable_modules
from tests.support.models.byte_transformer import make_model, random_tokens

TOKENS = torch.tensor([random_tokens(12)])


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(TOKENS).logits


def fill(model: nn.Module) -> None:
    """Random numbers in every B, so that adapters change something."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1, generator=generator)


# Convolutions


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, (3, 2), stride=2, bias=False)
        self.point = nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.point(F.relu(self.second(F.relu(self.first(x))))).mean((2, 3)))


PICTURES = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(2))
ALL = ["first", "second", "point", "head"]


CONV_SETTINGS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 6},
    {"r": 3, "use_rslora": True, "rank_pattern": {"point": 2}},
]


@pytest.mark.parametrize("settings", CONV_SETTINGS)
def test_convolutions_go_both_ways_between_us_and_peft(tmp_path: Path, settings: dict[str, Any]) -> None:
    theirs = get_peft_model(Pictures(), LoraConfig(target_modules=ALL, **settings))
    fill(theirs)
    theirs.save_pretrained(tmp_path / "peft")
    expected = theirs.eval()(PICTURES)
    model = load_adapter(Pictures(), tmp_path / "peft")
    assert (model(PICTURES) - Pictures()(PICTURES)).abs().max() > 1e-3
    torch.testing.assert_close(model(PICTURES), expected)
    merge_lora(model)
    torch.testing.assert_close(model(PICTURES), expected)
    unmerge_lora(model)
    save_adapter(model, tmp_path / "ours")
    again = PeftModel.from_pretrained(Pictures(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(PICTURES), expected)


def test_a_dilated_convolution_is_its_merged_weight() -> None:
    """PEFT's A has no dilation; ours has that of the layer, so the merged weight is W + scale · B A."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2, padding=2, padding_mode="reflect")).double()
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    apply_lora_to_model(model, LoRAConfig(r=2, lora_alpha=4, target_modules=["0"]))
    fill(model)
    own = adapter_layers(model)["0"].parameters_of("default")
    total = weight + 2 * torch.einsum("orij,rchw->ochw", own["lora_B"], own["lora_A"])
    x = PICTURES.double()
    expected = F.conv2d(F.pad(x, (2, 2, 2, 2), "reflect"), total, bias, dilation=2)
    torch.testing.assert_close(model(x), expected)
    merge_lora(model)
    torch.testing.assert_close(model(x), expected)


def test_convolutions_train() -> None:
    model = apply_lora_to_model(Pictures(), LoRAConfig(r=2, target_modules=ALL)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(PICTURES).square().sum().backward()
        optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".lora_" in name}


@pytest.mark.parametrize(
    ("layer", "fields", "said"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), {}, "0 is a Conv2d of 2 groups; only those of one can be adapted"),
        (nn.Conv2d(4, 4, 3), {"use_dora": True}, "use_dora must be False: 0 is a Conv2d"),
        (nn.Conv1d(4, 4, 3), {}, "match no linear module"),
        (nn.Conv2d(4, 4, 3), {"target_modules": "all-linear"}, "match no linear module"),  # as in PEFT
    ],
)
def test_convolutions_that_cannot_be_adapted_are_named(layer: nn.Module, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        apply_lora_to_model(nn.Sequential(layer), LoRAConfig(**{"target_modules": ["0"], **fields}))


# Quantized bases


@pytest.mark.parametrize("width", [GROUP, 3 * GROUP + 7, 5])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_frozen_linear_multiplies_by_weights_rounded_to_8_bits(width: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(width, 6, bias=has_bias)
    linear.weight.data[2] = 0
    frozen = FrozenInt8Linear(linear)
    rounded, weight = frozen.dequantized(), linear.weight.detach()
    for start in range(0, width, GROUP):
        group = slice(start, start + GROUP)
        step = weight[:, group].abs().amax(1, keepdim=True) / 127
        assert ((rounded - weight)[:, group].abs() <= step / 2 + 1e-6).all()
    x = torch.randn(4, width, requires_grad=True)
    y = frozen(x)
    expected = x.double() @ rounded.double().T + (linear.bias.double() if has_bias else 0)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    torch.testing.assert_close(x.grad.double(), gradient.double() @ rounded.double(), rtol=0, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def as_rounded(model: ByteTransformer) -> ByteTransformer:
    """The same model with float weights of what its frozen linears multiply by."""
    plain = make_model()
    for name, module in model.named_modules():
        if isinstance(module, FrozenInt8Linear):
            plain.get_submodule(name.removesuffix(".base_layer")).weight.data = module.dequantized()
    return plain


@pytest.mark.parametrize(
    "config", [LoRAConfig(target_modules="all-linear"), LoRAConfig(use_dora=True, modules_to_save=["lm_head"])]
)
@pytest.mark.parametrize("before", [False, True])
def test_a_quantized_base_gives_the_gradients_of_its_rounded_weights(config: LoRAConfig, before: bool) -> None:
    """Whether it is quantized before or after the adapter is added."""
    model = make_model()
    if before:
        quantize_frozen(model)
    torch.manual_seed(3)
    apply_lora_to_model(model, config)
    if not before:
        quantize_frozen(model)
    expected_model = as_rounded(model)
    num_frozen = sum(isinstance(module, FrozenInt8Linear) for module in model.modules())
    assert num_frozen == 21 and isinstance(expected_model.lm_head, nn.Linear)
    torch.manual_seed(3)
    apply_lora_to_model(expected_model, config)
    if config.use_dora and not before:  # it was made for the weights as they were
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                expected_model.get_parameter(name).data = parameter.detach().clone()
    for each in (model, expected_model):
        fill(each)
        each.train()(TOKENS, labels=TOKENS).loss.backward()
    gradients = {name: p.grad for name, p in expected_model.named_parameters() if p.requires_grad}
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == gradients.keys() and gradients
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-6)


def test_training_keeps_no_dequantized_weight() -> None:
    frozen = FrozenInt8Linear(nn.Linear(256, 128))
    saved: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        frozen(torch.randn(2, 256, requires_grad=True)).sum().backward()
    assert saved and all(tensor.dtype == torch.int8 or tensor.numel() < 128 * 256 for tensor in saved)


def test_an_adapter_of_a_quantized_base_is_an_ordinary_one(tmp_path: Path) -> None:
    model = quantize_frozen(apply_lora_to_model(make_model(), LoRAConfig(r=4)))
    fill(model)
    expected = logits(model)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(load_adapter(as_rounded(model), tmp_path)), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(load_adapter(quantize_frozen(make_model()), tmp_path)), expected)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj cannot be merged: its weight is quantized"):
        merge_lora(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    deactivate_lora(model)
    assert isinstance(model.model.layers[0].self_attn.q_proj, FrozenInt8Linear)
    assert not torch.equal(logits(model), expected)
    activate_lora(model, "default")
    assert torch.equal(logits(model), expected)


# Non-linear adapters

FORMULAS = {
    "gelu": lambda h: 0.5 * h * (1 + torch.erf(h / 2**0.5)),
    "relu": lambda h: h.clamp(min=0),
    "silu": lambda h: h / (1 + torch.exp(-h)),
    "tanh": lambda h: (torch.exp(h) - torch.exp(-h)) / (torch.exp(h) + torch.exp(-h)),
}


@pytest.mark.parametrize("activation", FORMULAS)
def test_a_non_linear_adapter_is_its_formula(activation: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    plain = model(x)
    apply_lora_to_model(model, LoRAConfig(r=4, lora_alpha=6, activation=activation, target_modules=["0"]))
    torch.testing.assert_close(model(x), plain)
    fill(model)
    own = adapter_layers(model)["0"].parameters_of("default")
    expected = plain + 1.5 * FORMULAS[activation](x @ own["lora_A"].T) @ own["lora_B"].T
    torch.testing.assert_close(model(x), expected)


def test_a_non_linear_adapter_trains_and_is_saved_and_loaded_by_us_alone(tmp_path: Path) -> None:
    model = apply_lora_to_model(make_model(), LoRAConfig(r=4, activation="silu")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    expected = logits(model)
    save_adapter(model, tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["stellarbyte_activation"] == "silu"
    torch.testing.assert_close(logits(load_adapter(make_model(), tmp_path)), expected)
    with pytest.raises(KeyError, match="STELLARBYTE_LORA"):
        PeftModel.from_pretrained(make_model(), tmp_path)
    with pytest.raises(ValueError, match="'default' has the activation 'silu': non-linear adapters"):
        merge_lora(model)
    assert torch.equal(logits(model), expected)
    files = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    with pytest.raises(AdapterError, match="stellarbyte_activation is 'silu', but only linear adapters can be merged"):
        read_adapter(*files, adaptable_modules(make_model().config), max_rank=8)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"activation": "swish"}, "activation .'swish'. must be one of gelu, relu, silu, tanh"),
        ({"activation": "relu", "use_dora": True}, "activation cannot be combined with use_dora"),
        ({"use_dora": 1}, "use_dora .1. must be True or False"),
        ({"modules_to_save": "lm_head"}, "modules_to_save .'lm_head'. must be a list"),
    ],
)
def test_configs_that_cannot_be_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LoRAConfig(**fields)
