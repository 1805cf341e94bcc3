"""Mixed adapters against PEFT's add_weighted_adapter on the same files, and against sums in float64."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from stellarbyte import ByteModelConfig, ByteTransformer
from stellarbyte.checkpoint.convert import convert
from stellarbyte.lora import AdapterError, read_adapter
from stellarbyte.lora.bank import LoraBank, PackedAdapter, pack_adapter
from stellarbyte.lora.mixing import mixed
from stellarbyte.model.parts import adaptable_modules
from tests.support.models.adapters import random_adapter
from tests.support.models.byte_transformer import make_config
from tests.support.models.hugging_face import tiny_llama

ADAPTERS = {
    "a": LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"]),
    "b": LoraConfig(r=3, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "v_proj", "up_proj"]),
    "c": LoraConfig(r=5, target_modules=["q_proj", "up_proj"], rank_pattern={"layers.1.self_attn.q_proj": 2}),
}
SCALES = {"a": 0.5, "b": 1.0, "c": 2.0}


def changes(packed: PackedAdapter, config: ByteModelConfig, max_rank: int = 64) -> dict[str, torch.Tensor]:
    """What a packed adapter adds to each weight, read from a slot of a bank."""
    bank = LoraBank(config, 1, max_rank)
    bank.fill(1, packed)
    return {
        name: bank.b(1, layer, number).double().T @ bank.a(1, layer, slice(number, number + 1)).double()
        for layer, number, name in bank.projections.modules()
        if bank.ranks_SLP[1, layer, number]
    }


def test_a_mix_is_what_peft_makes_of_the_same_files_by_concatenation(tmp_path: Path) -> None:
    llama = tiny_llama(tmp_path / "llama")
    model = ByteTransformer.from_pretrained(convert(llama, tmp_path / "ours"))
    for name, config in ADAPTERS.items():
        theirs = get_peft_model(LlamaForCausalLM.from_pretrained(llama), config)
        for parameter_name, parameter in theirs.named_parameters():
            if ".lora_B." in parameter_name:
                parameter.data.normal_(std=0.1)
        theirs.save_pretrained(tmp_path / name)
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), tmp_path / "a", "a")
    for name in "bc":
        theirs.load_adapter(tmp_path / name, name)
    theirs.base_model.add_weighted_adapter([*SCALES], [*SCALES.values()], "mix", combination_type="cat")

    parts = []
    for name, scale in SCALES.items():
        files = tmp_path / name / "adapter_config.json", tmp_path / name / "adapter_model.safetensors"
        adapter = read_adapter(*files, adaptable_modules(model.config), max_rank=8)
        scales = {module: adapter.scale_of(module) for module in adapter.weights}
        parts.append((pack_adapter(adapter.weights, scales, model.config, torch.float32), scale))
    packed = mixed(parts, model.config, max_rank=12)
    assert packed.ranks_LP.max() == 12
    found = changes(packed, model.config)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if "mix" in getattr(module, "lora_A", ())
    }
    assert found.keys() == layers.keys()
    for name, change in found.items():
        torch.testing.assert_close(change.float(), layers[name].get_delta_weight("mix"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mix_is_the_scaled_sum_of_its_parts(dtype: torch.dtype) -> None:
    """Modules that only some of the parts change, and ranks that differ from module to module."""
    config = make_config()
    adapters = [random_adapter(config, seed, share=0.6) for seed in range(4)]
    parts = [
        (pack_adapter(adapter.weights, adapter.scales, config, dtype), scale)
        for adapter, scale in zip(adapters, (1.0, 0.25, 0.0, 3.0), strict=True)
    ]
    found = changes(mixed(parts, config, 64), config)
    expected: dict[str, torch.Tensor] = {}
    for packed, scale in parts:
        for name, change in changes(packed, config).items():
            expected[name] = expected.get(name, torch.zeros(())) + scale * change
    assert found.keys() == expected.keys()
    for name, change in found.items():
        torch.testing.assert_close(
            change,
            expected[name],
            rtol=2**-8 if dtype == torch.bfloat16 else 1e-6,
            atol=5e-3 if dtype == torch.bfloat16 else 1e-6,
        )


def test_ranks_that_add_up_to_more_than_a_slot_holds_are_refused_with_their_number() -> None:
    config = make_config()
    adapters = [random_adapter(config, seed, ranks=(16,)) for seed in range(3)]
    parts = [(pack_adapter(adapter.weights, adapter.scales, config, torch.float32), 1.0) for adapter in adapters]
    assert mixed(parts, config, 48).ranks_LP.max() == 48
    with pytest.raises(AdapterError, match=r"its ranks add up to 48, but at most 47 is supported \(--max-lora-rank\)"):
        mixed(parts, config, 47)
