"""Heads removed from a model: their importance against float64 differences, the smaller model against masked heads."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stellarbyte import ByteTransformer, LoRAConfig
from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.native import load_model, open_checkpoint
from stellarbyte.compress import head_importance, heads_to_keep, prune_heads
from stellarbyte.lora import apply_lora_to_model
from tests.support.engines.engine import BACKENDS, Backend, ModelEngine
from tests.support.models import oracle
from tests.support.models.byte_transformer import EXPERTS, W, assert_same_model, make_config, make_model, random_tokens
from tests.support.models.hugging_face import tiny_llama

MODELS: dict[str, dict[str, Any]] = {
    "a key head for each": {"num_key_value_heads": 4, "use_xpos": False},
    "two heads share keys": {"use_xpos": False, "attention_bias": True, "attention_output_bias": True},
    "norms and tied": {"qk_norm": True, "tie_word_embeddings": True},
    "window and sinks": {"sliding_window": W, "sink_tokens": 2},
    "sinks of the softmax": {"use_xpos": False, "softmax_sink": True},
}
WITH_EXPERTS = {"experts of a pool": EXPERTS | {"moe_layers": [0, 2], "expert_pools": [0, 0]}}


def with_factors(model: ByteTransformer, factors_LH: torch.Tensor) -> dict[str, torch.Tensor]:
    """The model's weights in float64, every head's columns of the output projection multiplied by its factor."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for layer, factors_H in enumerate(factors_LH.double()):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        weights[name] = weights[name] * factors_H.repeat_interleave(model.config.head_dim)
    return weights


def half_of_the_groups(model: ByteTransformer) -> torch.Tensor:
    """[L, H] other groups in every layer."""
    groups, heads = model.config.num_key_value_heads, model.config.num_attention_heads
    keep_LK = torch.zeros(3, groups, dtype=torch.bool)
    for layer in range(3):
        keep_LK[layer, [(layer + 2 * kept) % groups for kept in range(groups // 2)]] = True
    return keep_LK.repeat_interleave(heads // groups, dim=1)


@pytest.mark.parametrize("name", ["two heads share keys", "window and sinks"])
def test_importance_is_the_change_of_each_sequences_loss(name: str) -> None:
    """Central differences of the oracle's loss, sequence by sequence."""
    model = make_model(**MODELS[name]).train()
    rows = [random_tokens(14), random_tokens(9, seed=1), random_tokens(14, seed=2)]
    ids, mask = torch.zeros(2, 14, dtype=torch.long), torch.zeros(2, 14, dtype=torch.long)
    for i, row in enumerate(rows[:2]):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    labels = torch.tensor(rows[2:])
    labels[:, :6] = -100
    batches = [
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": torch.tensor(rows[2:]), "labels": labels},
        {"input_ids": torch.tensor(rows[2:]), "labels": torch.full_like(labels, -100)},  # has no loss
    ]
    found = head_importance(model, batches)

    def loss(factors_LH: torch.Tensor, row: list[int], first: int) -> torch.Tensor:
        rows_TV = oracle.logprobs(with_factors(model, factors_LH), model.config, row)[:-1]
        return -rows_TV.gather(1, torch.tensor(row)[1:, None])[first:].mean()

    expected, step = torch.zeros(3, 4, dtype=torch.float64), 1e-4
    for layer, head in torch.cartesian_prod(torch.arange(3), torch.arange(4)).tolist():
        up, down = torch.ones(2, 3, 4, dtype=torch.float64)
        up[layer, head], down[layer, head] = 1 + step, 1 - step
        for row, first in zip(rows, (0, 0, 5), strict=True):
            expected[layer, head] += abs(loss(up, row, first) - loss(down, row, first)) / (2 * step) / 3
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-3)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_the_groups_with_the_least_importance_go() -> None:
    config = make_config(num_attention_heads=8, num_key_value_heads=4)
    importance = torch.tensor([[0, 9, 1, 1, 5, 0, 0, 4.5], [3, 3, 0, 0, 2, 2, 1, 1], [1, 0, 2, 0, 3, 0, 4, 0]]).float()
    kept = {
        0.0: ["11111111"] * 3,
        0.25: ["11001111", "11001111", "00111111"],
        0.5: ["11001100", "11001100", "00001111"],
        0.9: ["11000000", "11000000", "00000011"],
    }
    for ratio, rows in kept.items():
        found = heads_to_keep(importance, config, ratio)
        assert ["".join(map(str, row)) for row in found.int().tolist()] == rows


@torch.no_grad()
@pytest.mark.parametrize("name", [*MODELS, *WITH_EXPERTS])
def test_a_pruned_model_computes_what_masked_heads_would(name: str) -> None:
    model = make_model(**(MODELS | WITH_EXPERTS)[name])
    keep = half_of_the_groups(model)
    small = prune_heads(model, keep)
    assert small.config.num_attention_heads == model.config.num_attention_heads // 2
    assert small.num_parameters() < model.num_parameters() and not small.training
    tokens = random_tokens(3 * W)
    expected = oracle.logprobs(with_factors(model, keep), model.config, tokens)
    assert (small(torch.tensor([tokens])).logits[0].double().log_softmax(dim=-1) - expected).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_ratio_of_0_gives_the_same_bits_in_memory_of_its_own(name: str) -> None:
    model = make_model(**MODELS[name])
    same = prune_heads(model, heads_to_keep(torch.rand(3, 4), model.config, 0))
    tokens = torch.tensor([random_tokens(2 * W)])
    assert_same_model(same, model, tokens)
    assert same.config.to_dict() == model.config.to_dict()
    before = model(tokens).logits
    for parameter in same.parameters():
        parameter.zero_()
    assert torch.equal(model(tokens).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_model_is_saved_loaded_and_served(name: str, backend: Backend, tmp_path: Path) -> None:
    model = make_model(**MODELS[name])
    keep = half_of_the_groups(model)
    prune_heads(model, keep).save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path).config.num_key_value_heads == model.config.num_key_value_heads // 2
    tokens = random_tokens(3 * W)
    expected = oracle.logprobs(with_factors(model, keep), model.config, tokens)
    served = ModelEngine(load_model(tmp_path), backend=backend).teacher_forced(tokens, 10)
    assert (served - expected[9:]).abs().max() <= 1e-4


@torch.no_grad()
def test_a_pruned_llama_is_one_for_transformers_and_converts(tmp_path: Path) -> None:
    model = load_model(convert(tiny_llama(tmp_path / "source"), tmp_path / "whole"))
    tokens = torch.tensor([random_tokens(20)])
    small = prune_heads(model, heads_to_keep(head_importance(model, [{"input_ids": tokens}]), model.config, 0.5))
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps", "head_dim")
    heads = ("num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(**{name: getattr(small.config, name) for name in (*fields, *heads)})
    assert [getattr(config, name) for name in heads] == [2, 1]
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(small.state_dict())
    expected = llama(tokens).logits
    torch.testing.assert_close(small(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    llama.save_pretrained(tmp_path / "llama")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "source" / file, tmp_path / "llama" / file)
    converted = load_model(convert(tmp_path / "llama", tmp_path / "converted"))
    torch.testing.assert_close(converted(tokens).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_pruned_model_trains() -> None:
    model = make_model().train()
    small = prune_heads(model, half_of_the_groups(model))
    tokens = torch.tensor([random_tokens(12)])
    small(tokens, labels=tokens).loss.backward()
    assert small.training and all(parameter.grad is not None for parameter in small.parameters())


def test_what_cannot_be_pruned_is_told_in_a_sentence() -> None:
    model = make_model()
    keep = half_of_the_groups(model)
    split, uneven, none = keep.clone(), keep.clone(), torch.zeros_like(keep)
    split[2, 0] = ~split[2, 0]
    uneven[1] = True
    for mask, message in (
        (split, "the mask splits a group in layer 2: 2 heads share keys and values"),
        (uneven, "the mask keeps 4 heads in layer 1 and 2 in layer 0; every layer must keep the same number"),
        (none, "the mask keeps 0 heads in layer 0"),
        (keep.float(), r"the mask is torch.float32 \[3, 4\], expected torch.bool \[3, 4\]"),
        (keep[:2], r"the mask is torch.bool \[2, 4\], expected torch.bool \[3, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_heads(model, mask)
    for ratio in (-0.1, 1):
        with pytest.raises(ValueError, match="must be at least 0 and less than 1"):
            heads_to_keep(torch.rand(3, 4), model.config, ratio)
    with pytest.raises(ValueError, match=r"importance has shape \[4, 3\], expected \[3, 4\]"):
        heads_to_keep(torch.rand(4, 3), model.config, 0.5)
    with pytest.raises(ValueError, match="batches hold no sequence with a label"):
        head_importance(model, [])
    adapted = apply_lora_to_model(make_model(), LoRAConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="the model has adapters"):
        prune_heads(adapted, keep)
    with pytest.raises(ValueError, match="cannot be removed with qk_norm_per_head=False"):
        prune_heads(make_model(qk_norm=True, qk_norm_per_head=False), keep)
