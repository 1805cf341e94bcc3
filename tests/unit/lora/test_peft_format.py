"""Adapter files against PEFT itself: what it writes we read, what we write it reads, with the same logits."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from stellarbyte import ByteTransformer
from stellarbyte.checkpoint.convert import convert
from stellarbyte.lora import (
    Adapter,
    LoRAConfig,
    LoRALayer,
    activate_lora,
    apply_lora_to_model,
    deactivate_lora,
    load_adapter,
    merge_lora,
    read_adapter,
    remove_lora,
    save_adapter,
)
from stellarbyte.lora.adapted_model import adaptable_layers
from stellarbyte.lora.layers import weight_shape
from tests.support.models.hugging_face import tiny_llama

TOKENS = torch.tensor([[5, 17, 200, 31, 8, 90, 2, 44]])
LLAMA_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rank stabilized": {"r": 4, "lora_alpha": 4, "use_rslora": True, "target_modules": ["o_proj", "down_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 6, r"^model\.layers\.(0|2)\.mlp\..*": 3},
        "alpha_pattern": {"q_proj": 24, "layers.1.mlp.up_proj": 5},
    },
    "one regular expression": {"r": 2, "target_modules": r"model\.layers\.(0|2)\.(self_attn|mlp)\.[qu].*_proj"},
    "all linear": {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "lora_dropout": 0.1},
    "some layers": {"r": 4, "target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"r": 4, "target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0.*"},
    "output head": {"r": 4, "target_modules": ["lm_head", "gate_proj"]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Llama's folder and the folder of the same model as a ByteTransformer."""
    folder = tmp_path_factory.mktemp("bases")
    llama = tiny_llama(folder / "llama", initializer_range=0.15)
    return llama, convert(llama, folder / "ours")


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, **sizes)).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(TOKENS).logits


def peft_adapter(base: nn.Module, folder: Path, seed: int = 0, **settings: Any) -> torch.Tensor:
    """Let PEFT write an adapter whose B is not zero; returns PEFT's own logits."""
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return logits(model)


def read(model: nn.Module, folder: Path, max_rank: int = 64) -> Adapter:
    shapes = {name: weight_shape(layer) for name, layer in adaptable_layers(model).items()}
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    return read_adapter(config, weights, shapes, max_rank=max_rank)


def test_names_with_the_default_adapter_in_them_are_read_as_peft_reads_them(
    bases: tuple[Path, Path], tmp_path: Path
) -> None:
    llama, ours = bases
    expected = peft_adapter(AutoModelForCausalLM.from_pretrained(llama), tmp_path, r=4, target_modules=["q_proj"])
    file = tmp_path / "adapter_model.safetensors"
    renamed = {name.replace(".weight", ".default.weight"): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file)
    by_peft = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path))
    torch.testing.assert_close(by_peft, expected)
    torch.testing.assert_close(logits(load_adapter(ByteTransformer.from_pretrained(ours), tmp_path)), expected)


@pytest.mark.parametrize("case", LLAMA_CONFIGS)
def test_what_peft_writes_we_read_and_write_back(bases: tuple[Path, Path], tmp_path: Path, case: str) -> None:
    llama, ours = bases
    expected = peft_adapter(LlamaForCausalLM.from_pretrained(llama), tmp_path / "peft", **LLAMA_CONFIGS[case])
    model = ByteTransformer.from_pretrained(ours)
    without = logits(model)
    assert load_adapter(model, tmp_path / "peft") is model
    assert (logits(model) - without).abs().max() > 0.01
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    around_ours = PeftModel.from_pretrained(ByteTransformer.from_pretrained(ours), tmp_path / "peft")
    torch.testing.assert_close(logits(around_ours), expected, rtol=0, atol=1e-5)
    save_adapter(model, tmp_path / "ours")
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), tmp_path / "ours")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-6)
    first, second = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("peft", "ours"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("targets", [["c_attn", "c_proj"], "all-linear"])
def test_gpt2_whose_weights_lie_the_other_way(tmp_path: Path, targets: Any) -> None:
    settings = {"r": 4, "target_modules": targets, "fan_in_fan_out": True}
    expected = peft_adapter(tiny_gpt2(), tmp_path / "peft", **settings)
    model = load_adapter(tiny_gpt2(), tmp_path / "peft")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    merge_lora(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    save_adapter(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "ours")), expected)


@pytest.mark.parametrize("case", LLAMA_CONFIGS)
def test_what_we_train_peft_reads(bases: tuple[Path, Path], tmp_path: Path, case: str) -> None:
    """Our own config in place of PEFT's; where PEFT has options that we have not, the plain rest."""
    llama, ours = bases
    settings = {name: value for name, value in LLAMA_CONFIGS[case].items() if name in LoRAConfig.__dataclass_fields__}
    model = apply_lora_to_model(ByteTransformer.from_pretrained(ours), LoRAConfig(**settings), "mine")
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    expected = logits(model)
    deactivate_lora(model)  # kept aside, it can be saved all the same
    save_adapter(model, tmp_path / "new" / "folder", "mine")
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "new" / "folder")
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-5)
    written = json.loads((tmp_path / "new" / "folder" / "adapter_config.json").read_text())
    if case != "all linear":
        assert written["target_modules"] == settings["target_modules"]


def test_two_loaded_adapters_are_added_up_as_in_peft(bases: tuple[Path, Path], tmp_path: Path) -> None:
    llama, ours = bases
    peft_adapter(LlamaForCausalLM.from_pretrained(llama), tmp_path / "a", 1, **LLAMA_CONFIGS["plain"])
    peft_adapter(LlamaForCausalLM.from_pretrained(llama), tmp_path / "b", 2, **LLAMA_CONFIGS["rank stabilized"])
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), tmp_path / "a", "a")
    theirs.load_adapter(tmp_path / "b", "b")
    theirs.base_model.set_adapter(["a", "b"])
    model = ByteTransformer.from_pretrained(ours)
    load_adapter(model, tmp_path / "a", "a")
    load_adapter(model, tmp_path / "b", "b")
    activate_lora(model, "a", "b")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="already has an adapter 'a'"):
        load_adapter(model, tmp_path / "b", "a")
    remove_lora(model, "a")
    remove_lora(model, "b")
    assert not any(isinstance(module, LoRALayer) for module in model.modules())


def test_a_loaded_adapter_is_frozen_and_ready_for_inference(bases: tuple[Path, Path], tmp_path: Path) -> None:
    llama, ours = bases
    peft_adapter(LlamaForCausalLM.from_pretrained(llama), tmp_path, **LLAMA_CONFIGS["all linear"])
    model = load_adapter(ByteTransformer.from_pretrained(ours).train(), tmp_path)
    assert not any(module.training for module in model.modules())
    activate_lora(model, "default")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(".lora_" in name for name in trainable)
    assert len(trainable) == len(list(ByteTransformer.from_pretrained(ours).parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_keep_their_dtype(bases: tuple[Path, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    llama, ours = bases
    peft_adapter(LlamaForCausalLM.from_pretrained(llama), tmp_path, **LLAMA_CONFIGS["patterns"])
    file = tmp_path / "adapter_model.safetensors"
    stored = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(stored, file)
    model = ByteTransformer.from_pretrained(ours)
    adapter = read(model, tmp_path)
    for module, matrices in adapter.weights.items():
        for letter, matrix in zip("AB", matrices, strict=True):
            assert torch.equal(matrix, stored[f"base_model.model.{module}.lora_{letter}.weight"])
    assert adapter.num_bytes == sum(tensor.nbytes for tensor in stored.values())
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), tmp_path)
    torch.testing.assert_close(logits(load_adapter(model, tmp_path)), logits(theirs), rtol=0, atol=1e-5)


def test_tensors_that_are_not_aligned_are_read_right(bases: tuple[Path, Path], tmp_path: Path) -> None:
    """The format allows any order of dtypes and a header of any length: float32 may begin at an odd byte."""
    peft_adapter(LlamaForCausalLM.from_pretrained(bases[0]), tmp_path, **LLAMA_CONFIGS["plain"] | {"r": 1})
    file = tmp_path / "adapter_model.safetensors"
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}  # load_file maps what is overwritten
    odd = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    stored = {odd: stored.pop(odd)[:, :1].half(), **stored}  # 2 bytes first
    header, body = {}, b""
    for name, tensor in stored.items():
        content = tensor.numpy().tobytes()
        dtype = "F16" if tensor.dtype == torch.float16 else "F32"
        span = [len(body), len(body) + len(content)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": span}
        body += content
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + body)
    model = ByteTransformer.from_pretrained(bases[1])
    shapes = {name: weight_shape(layer) for name, layer in adaptable_layers(model).items()}
    shapes["model.layers.0.self_attn.q_proj"] = (32, 1)
    adapter = read_adapter(tmp_path / "adapter_config.json", file, shapes, max_rank=8)
    for module, (a, _) in adapter.weights.items():
        assert torch.equal(a, stored[f"base_model.model.{module}.lora_A.weight"]), module


def test_the_hash_is_of_what_changes_the_outputs(bases: tuple[Path, Path], tmp_path: Path) -> None:
    llama, ours = bases
    model = ByteTransformer.from_pretrained(ours)
    peft_adapter(LlamaForCausalLM.from_pretrained(llama), tmp_path, **LLAMA_CONFIGS["patterns"])
    config_file, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    content = json.loads(config_file.read_text())

    def hash_with(**changes: Any) -> str:
        config_file.write_text(json.dumps(content | changes, indent=7))
        return read(model, tmp_path).content_hash

    first = hash_with()
    assert len(first) == 64 and int(first, 16)
    assert hash_with(lora_dropout=0.3, base_model_name_or_path="elsewhere", lora_alpha=8.0) == first
    turned = dict(reversed(content["alpha_pattern"].items()))
    changed = [hash_with(lora_alpha=9), hash_with(use_rslora=True), hash_with(alpha_pattern=turned)]
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, weights)
    changed.append(hash_with())
    assert len({first, *changed}) == 5


def test_targets_without_tensors_are_reported(bases: tuple[Path, Path], tmp_path: Path) -> None:
    llama, ours = bases
    peft_adapter(LlamaForCausalLM.from_pretrained(llama), tmp_path, **LLAMA_CONFIGS["plain"])
    file = tmp_path / "adapter_config.json"
    listed = ["self_attn.v_proj", "fused_qkv", "model.layers.0.self_attn.q_proj", "proj"]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": listed}))
    model = ByteTransformer.from_pretrained(ours)
    adapter = read(model, tmp_path)
    assert adapter.unmatched_targets == ("fused_qkv", "proj")
    assert adapter.scale_of("model.layers.2.self_attn.q_proj") == 2.0
    save_adapter(load_adapter(model, tmp_path), tmp_path / "again")  # with a list that PEFT understands
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), tmp_path / "again")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)


def test_saving_is_refused_where_it_would_be_wrong(bases: tuple[Path, Path], tmp_path: Path) -> None:
    model = ByteTransformer.from_pretrained(bases[1])
    with pytest.raises(ValueError, match="no adapter 'default'; it has none"):
        save_adapter(model, tmp_path / "x")
    apply_lora_to_model(model, LoRAConfig(r=4, target_modules=["q_proj"]))
    apply_lora_to_model(model, LoRAConfig(r=4, target_modules=["v_proj"]))
    save_adapter(model, tmp_path / "both")
    assert len(read(model, tmp_path / "both").weights) == 6
    apply_lora_to_model(model, LoRAConfig(r=2, target_modules=["k_proj"]))
    with pytest.raises(ValueError, match="from different configs"):
        save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
