"""Activated adapters (aLoRA) in a model, against PEFT's own forward, generate and offsets."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.variants import calculate_alora_offsets
from transformers import LlamaForCausalLM

from stellarbyte import ByteTransformer
from stellarbyte.checkpoint.convert import convert
from stellarbyte.lora import (
    LoRAConfig,
    activate_lora,
    apply_lora_to_model,
    deactivate_lora,
    load_adapter,
    merge_lora,
    save_adapter,
)
from stellarbyte.lora.invocation import activated
from tests.support.models.hugging_face import tiny_llama

INVOCATION = [9, 7]
TEXTS = torch.tensor(
    [
        [5, 17, 200, 31, 8, 90, 2, 44],  # none
        [5, 17, 9, 7, 8, 90, 2, 44],
        [9, 7, 200, 31, 9, 7, 2, 44],  # two: the last one counts
        [5, 17, 9, 9, 7, 90, 9, 44],
        [5, 17, 200, 31, 8, 90, 9, 7],  # at the end
    ]
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Llama's folder and the folder of the same model as a ByteTransformer."""
    folder = tmp_path_factory.mktemp("bases")
    llama = tiny_llama(folder / "llama", initializer_range=0.15)
    return llama, convert(llama, folder / "ours")


@pytest.fixture(scope="module")
def by_peft(bases: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, Path]:
    """PEFT's own model with an activated adapter, and the adapter's folder."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", alora_invocation_tokens=list(INVOCATION)
    )
    model = get_peft_model(LlamaForCausalLM.from_pretrained(bases[0]), config).eval()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    return model, folder


def ours(bases: tuple[Path, Path], folder: Path) -> ByteTransformer:
    return load_adapter(ByteTransformer.from_pretrained(bases[1]), folder)


@pytest.mark.parametrize("invocation", [(1,), (1, 2), (1, 1), (2, 1, 1)])
def test_a_text_is_activated_where_pefts_offsets_begin(invocation: tuple[int, ...]) -> None:
    texts = torch.randint(0, 3, (40, 12), generator=torch.Generator().manual_seed(len(invocation)))
    config = {"a": LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=list(invocation))}
    offsets = calculate_alora_offsets(config, "a", texts)
    assert None in offsets or invocation == (1,)
    counts = activated(texts, invocation).sum(1).tolist()
    assert counts == [offset or 0 for offset in offsets]
    together = activated(texts.view(1, -1), invocation, torch.arange(40).repeat_interleave(12)[None])
    assert torch.equal(together.view(40, 12), activated(texts, invocation))  # documents of a packed row


@torch.no_grad()
def test_logits_are_pefts_with_and_without_invocations(
    bases: tuple[Path, Path], by_peft: tuple[PeftModel, Path], tmp_path: Path
) -> None:
    expected = by_peft[0](TEXTS).logits
    model = ours(bases, by_peft[1])
    torch.testing.assert_close(model(TEXTS).logits, expected, rtol=0, atol=1e-5)
    base = LlamaForCausalLM.from_pretrained(bases[0]).eval()(TEXTS).logits
    torch.testing.assert_close(expected[0], base[0])
    assert (expected[1, 2:] - base[1, 2:]).abs().max() > 0.01
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["alora_invocation_tokens"] == INVOCATION
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(bases[0]), tmp_path).eval()
    torch.testing.assert_close(again(TEXTS).logits, expected, rtol=0, atol=1e-6)


def test_what_is_generated_has_the_adapter_as_in_peft(
    bases: tuple[Path, Path], by_peft: tuple[PeftModel, Path]
) -> None:
    model = ours(bases, by_peft[1])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = by_peft[0].generate(input_ids=TEXTS, **options)
    assert model.generate(TEXTS, **options).tolist() == expected.tolist()


def test_gradients_are_pefts_in_packed_rows_and_recomputed_layers(
    bases: tuple[Path, Path], by_peft: tuple[PeftModel, Path]
) -> None:
    torch_model = copy.deepcopy(by_peft[0])
    for name, parameter in torch_model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    labels = TEXTS.clone()
    labels[:, :3] = -100
    torch_model(TEXTS, labels=labels).loss.backward()
    expected = {name: p.grad for name, p in torch_model.named_parameters() if p.requires_grad}
    config = LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear", alora_invocation_tokens=INVOCATION)
    model = apply_lora_to_model(ByteTransformer.from_pretrained(bases[1]), config)
    given = dict(torch_model.named_parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        parameter.data.copy_(given[f"base_model.model.{name}"].data)
    model.train()
    model._set_gradient_checkpointing(every_n_layers=1)
    documents = torch.arange(len(TEXTS)).repeat_interleave(TEXTS.shape[1])[None]
    positions = torch.arange(TEXTS.shape[1]).repeat(len(TEXTS))[None]
    packed = {"input_ids": TEXTS.view(1, -1), "labels": labels.view(1, -1), "position_ids": positions}
    model(**packed, document_ids=documents, skip_logits=True).loss.backward()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, expected[f"base_model.model.{name}"], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_copied_model_and_one_whose_adapter_is_put_back_follow_their_own_calls(
    bases: tuple[Path, Path], by_peft: tuple[PeftModel, Path]
) -> None:
    expected = by_peft[0](TEXTS).logits
    model = ours(bases, by_peft[1])
    model(TEXTS[:1])
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(TEXTS).logits, expected, rtol=0, atol=1e-5)
    deactivate_lora(model)
    base = model(TEXTS).logits
    assert (base - expected).abs().max() > 0.01
    activate_lora(model, "default")
    torch.testing.assert_close(model(TEXTS).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_what_cannot_be_is_refused_by_name(bases: tuple[Path, Path], by_peft: tuple[PeftModel, Path]) -> None:
    model = ours(bases, by_peft[1])
    with pytest.raises(ValueError, match="activated by alora_invocation_tokens"):
        merge_lora(model)
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=model.model.embed_tokens(TEXTS))
    cache = model(TEXTS, use_cache=True).past_key_values
    model(TEXTS[:2])
    with pytest.raises(ValueError, match="cache of the model's last call"):
        model(TEXTS[:, :1], past_key_values=cache)
    for tokens in ([], [1, "2"], [True], [-1], 5, "text", [1.0]):
        with pytest.raises(ValueError, match="alora_invocation_tokens"):
            LoRAConfig(alora_invocation_tokens=tokens)
    for other in ({"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"activation": "silu"}):
        with pytest.raises(ValueError, match=f"alora_invocation_tokens cannot be combined with {next(iter(other))}"):
            LoRAConfig(alora_invocation_tokens=[1], **other)
    for config, reason in (
        ({"alora_invocation_tokens": [1 << 20]}, "the model has 300 tokens"),
        ({"alora_invocation_tokens": [1], "target_modules": ["lm_head"]}, "the output head"),
    ):
        with pytest.raises(ValueError, match=reason):
            apply_lora_to_model(ByteTransformer.from_pretrained(bases[1]), LoRAConfig(**config))
