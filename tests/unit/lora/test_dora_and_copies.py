"""DoRA and modules_to_save against PEFT: files both ways, outputs, gradients, merging."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from stellarbyte import ByteTransformer
from stellarbyte.checkpoint.convert import convert
from stellarbyte.lora import (
    AdapterError,
    LoRAConfig,
    activate_lora,
    apply_lora_to_model,
    deactivate_lora,
    load_adapter,
    merge_lora,
    read_adapter,
    save_adapter,
    unmerge_lora,
)
from stellarbyte.lora.adapted_model import adapter_layers
from stellarbyte.lora.layers import LoRALayer
from stellarbyte.model.parts import adaptable_modules
from tests.support.models.hugging_face import tiny_llama

TOKENS = torch.tensor([[5, 17, 200, 31, 8, 90, 7, 44]])  # none is Llama's padding, which gets no gradient
CONFIGS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "target_modules": "all-linear"},
    "dora, some modules": {"use_dora": True, "use_rslora": True, "target_modules": ["v_proj", "down_proj"]},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "head and embedding": {"target_modules": ["up_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "all": {"use_dora": True, "target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "norm"]},
}
for config in CONFIGS.values():
    config |= {"r": 4, "lora_alpha": 6}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Llama's folder and the folder of the same model as a ByteTransformer."""
    folder = tmp_path_factory.mktemp("bases")
    llama = tiny_llama(folder / "llama", initializer_range=0.15)
    return llama, convert(llama, folder / "ours")


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(TOKENS).logits


def is_of_adapter(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def peft_model(base: nn.Module, **settings: Any) -> nn.Module:
    """PEFT's model, with random numbers in all that its adapter trains."""
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if is_of_adapter(name) and ".lora_A." not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("case", CONFIGS)
def test_files_go_both_ways_with_the_same_outputs(bases: tuple[Path, Path], tmp_path: Path, case: str) -> None:
    llama, ours = bases
    theirs = peft_model(LlamaForCausalLM.from_pretrained(llama), **CONFIGS[case])
    theirs.save_pretrained(tmp_path / "peft")
    expected = logits(theirs)
    model = ByteTransformer.from_pretrained(ours)
    before, plain = bits(model), logits(model)
    load_adapter(model, tmp_path / "peft")
    assert (logits(model) - plain).abs().max() > 0.01
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    save_adapter(model, tmp_path / "ours")
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), tmp_path / "ours")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
    first, second = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("peft", "ours"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    with_adapter = bits(model)
    merge_lora(model)
    assert bits(model) != with_adapter
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5)
    unmerge_lora(model)
    assert bits(model) == with_adapter
    deactivate_lora(model)
    assert bits(model) == before
    assert torch.equal(logits(model), plain)
    activate_lora(model, "default")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CONFIGS)
def test_what_trains_has_pefts_gradients(bases: tuple[Path, Path], tmp_path: Path, case: str) -> None:
    llama, ours = bases
    theirs = peft_model(LlamaForCausalLM.from_pretrained(llama), **CONFIGS[case]).eval()
    theirs.save_pretrained(tmp_path)
    model = apply_lora_to_model(ByteTransformer.from_pretrained(ours), LoRAConfig(**CONFIGS[case]))
    values = dict(load_adapter(ByteTransformer.from_pretrained(ours), tmp_path).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    for each in (theirs, model):
        each(TOKENS, labels=TOKENS).loss.backward()
    expected = {
        name.removeprefix("base_model.model.").replace("_vector.default.weight", "_vector.default"): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_dora_is_its_formula_in_float64() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(6, 5).double()
    model = nn.Sequential(layer)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    x = torch.randn(3, 6, dtype=torch.float64)
    apply_lora_to_model(model, LoRAConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["0"]))
    torch.testing.assert_close(model(x), x @ weight.T + bias)  # a new adapter changes nothing
    wrapper = adapter_layers(model)["0"]
    assert isinstance(wrapper, LoRALayer)
    own = wrapper.parameters_of("default")
    with torch.no_grad():
        for parameter in own.values():
            parameter.normal_()
    a, b, m = (own[key].detach() for key in ("lora_A", "lora_B", "lora_magnitude_vector"))
    direction = weight + 1.5 * b @ a
    expected = x @ (m[:, None] * direction / direction.norm(dim=1, keepdim=True)).T + bias
    torch.testing.assert_close(model(x), expected)
    merge_lora(model)
    torch.testing.assert_close(model(x), expected)


def test_gpt2_whose_weights_lie_the_other_way(tmp_path: Path) -> None:
    def base() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        sizes = {"n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=300, **sizes)).eval()

    settings = {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}
    theirs = peft_model(base(), **settings)
    theirs.save_pretrained(tmp_path / "peft")
    model = load_adapter(base(), tmp_path / "peft")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-5)
    merge_lora(model)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-5)
    unmerge_lora(model)
    save_adapter(model, tmp_path / "ours")
    again = PeftModel.from_pretrained(base(), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(theirs), rtol=0, atol=1e-5)


def test_a_copy_of_a_tied_head_leaves_the_embedding_alone(bases: tuple[Path, Path]) -> None:
    model = ByteTransformer.from_pretrained(bases[1])
    model.lm_head.weight = model.model.embed_tokens.weight
    apply_lora_to_model(model, LoRAConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    plain, embedding = logits(model), model.model.embed_tokens.weight.clone()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name}
    assert list(trained) == ["lm_head.modules_to_save.default.weight"]
    with torch.no_grad():
        next(iter(trained.values())).mul_(2)
    torch.testing.assert_close(logits(model), 2 * plain, rtol=1e-5, atol=1e-5)
    merge_lora(model)
    torch.testing.assert_close(logits(model), 2 * plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.model.embed_tokens.weight, embedding)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LoRAConfig(modules_to_save=["heads"]), "modules_to_save has 'heads', which matches no module"),
        (LoRAConfig(target_modules=["lm_head"], modules_to_save=["lm_head"]), "may not contain lm_head, which has"),
        (LoRAConfig(target_modules=["norm"], modules_to_save=["lm_head"]), "match no linear module"),
    ],
)
def test_modules_that_cannot_be_copied_are_named(bases: tuple[Path, Path], config: LoRAConfig, said: str) -> None:
    model = ByteTransformer.from_pretrained(bases[1])
    before = bits(model)
    with pytest.raises(ValueError, match=said):
        apply_lora_to_model(model, config)
    assert bits(model) == before


def test_two_copies_of_one_module_are_not_active_at_once(bases: tuple[Path, Path]) -> None:
    model = ByteTransformer.from_pretrained(bases[1])
    for name in "ab":
        apply_lora_to_model(model, LoRAConfig(modules_to_save=["lm_head"]), name)
    with pytest.raises(ValueError, match="only one active adapter may have lm_head in its modules_to_save"):
        activate_lora(model, "a", "b")
    assert adapter_layers(model)["lm_head"].active == ("b",)


EDITS = {
    "no magnitude": ("dora", "lora_magnitude_vector", None, "contains no lora_magnitude_vector of 'model.layers"),
    "shape of a magnitude": ("dora", "lora_magnitude_vector", torch.ones(3), r"is \[3\] of type F32, but must be \["),
    "no copy": ("head", "lm_head.weight", None, "contains no base_model.model.lm_head.weight, which modules_to_save"),
    "shape of a copy": ("head", "lm_head.weight", torch.ones(3, 4), r"is \[3, 4\] of type F32, but must be \["),
    "a copy of integers": ("head", "lm_head.weight", torch.ones(3, dtype=torch.int32), r"of type I32, but must be \["),
}


@pytest.mark.parametrize("edit", EDITS)
def test_files_that_lack_something_are_refused(bases: tuple[Path, Path], tmp_path: Path, edit: str) -> None:
    case, ending, tensor, said = EDITS[edit]
    peft_model(LlamaForCausalLM.from_pretrained(bases[0]), **CONFIGS[case]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    stored = {name: value.clone() for name, value in load_file(file).items()}
    name = next(name for name in stored if name.endswith(ending))
    del stored[name]
    save_file(stored if tensor is None else stored | {name: tensor}, file)
    model = ByteTransformer.from_pretrained(bases[1])
    before = bits(model)
    with pytest.raises(AdapterError, match=said):
        load_adapter(model, tmp_path)
    assert bits(model) == before


@pytest.mark.parametrize(("case", "field"), [("dora", "use_dora"), ("head", "modules_to_save")])
def test_a_reader_that_accepts_plain_lora_only_names_the_field(
    bases: tuple[Path, Path], tmp_path: Path, case: str, field: str
) -> None:
    peft_model(LlamaForCausalLM.from_pretrained(bases[0]), **CONFIGS[case]).save_pretrained(tmp_path)
    shapes = adaptable_modules(ByteTransformer.from_pretrained(bases[1]).config)
    files = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    assert json.loads(files[0].read_text())[field]
    with pytest.raises(AdapterError, match=f"'{field}' is .*, but only plain LoRA without it is supported"):
        read_adapter(*files, shapes, max_rank=8)
