"""`describe` counts what a model costs, and says honestly whether a sequence is constant in memory."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from stellarbyte.checkpoint.info import ModelInfo, describe, describe_lines, size
from stellarbyte.checkpoint.native import load_language_model, open_checkpoint
from tests.support.models.byte_transformer import EXPERTS, VARIANTS, make_model


def info(folder: Path, **overrides: Any) -> ModelInfo:
    make_model(**overrides).save_pretrained(folder)
    return describe(open_checkpoint(folder))


def test_counts_are_those_of_the_model(tmp_path: Path):
    model = make_model(attention_bias=True, qk_norm=True)
    found = info(tmp_path, attention_bias=True, qk_norm=True)
    assert found.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.weight_bytes == {"float32": 4 * found.num_parameters, "bfloat16": 2 * found.num_parameters}
    assert found.disk_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert found.stored_dtype == "float32"
    assert found.kv_bytes_per_token == {"float32": 2 * 3 * 2 * 16 * 4, "bfloat16": 2 * 3 * 2 * 16 * 2}


@pytest.mark.parametrize("is_tied", [False, True])
def test_bytes_on_a_gpu_are_those_that_the_kernels_read(is_tied: bool, tmp_path: Path):
    pytest.importorskip("triton", reason="Triton is not installed")
    from stellarbyte.backends.gpu.model import TritonModel

    sizes = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": is_tied, "attention_bias": True}
    found = info(tmp_path, **sizes).gpu_weight_bytes
    assert list(found) == ["int8", "fp8", "int4"]
    for quantization, num_bytes in found.items():
        model = load_language_model(tmp_path, dtype=torch.bfloat16)
        served = TritonModel(model, open_checkpoint(tmp_path).config, quantization=quantization)
        parts = [served.embedding_VC, served.final_norm_C, served.head_weight, served.layers]
        assert sum(tensor.nbytes for tensor in tensors_of(parts)) == num_bytes


def tensors_of(part: Any) -> list[torch.Tensor]:
    """Of a weight, a layer, or a list of them."""
    if isinstance(part, torch.Tensor):
        return [part]
    parts = part if isinstance(part, list) else vars(part).values() if dataclasses.is_dataclass(part) else []
    return [tensor for inner in parts for tensor in tensors_of(inner)]


def test_int4_has_no_bytes_where_a_gpu_refuses_it(tmp_path: Path):
    assert "int4" not in info(tmp_path / "experts", **EXPERTS).gpu_weight_bytes
    assert "int4" not in info(tmp_path / "odd", intermediate_size=80).gpu_weight_bytes


@pytest.mark.parametrize(
    ("options", "layers", "experts", "idle"),
    [
        (
            {"shared_expert_intermediate_size": 16, "shared_expert_gate": True, "moe_layers": [1, 2]},
            "1 × (attention + MLP 80, silu) and 2 × (attention + experts, silu)",
            "6 of 24, 2 per token, softmax scores, renormalised; a shared one of 16 with a gate; in layers 1, 2",
            2 * 4,
        ),
        (
            {"expert_pools": [0, 1, 0], "router_score": "sigmoid", "norm_topk_prob": False},
            "3 × (attention + experts, silu)",
            "6 of 24, 2 per token, sigmoid scores; 2 pools",
            2 * 6 - 3 * 2,
        ),
        (
            {"router_top_p": 0.5, "num_experts_per_tok": 4},
            "3 × (attention + experts, silu)",
            "6 of 24, 1 to 4 per token, up to 0.5 of the scores, softmax scores, renormalised",
            3 * 2,
        ),
        (
            {"swiglu_limit": 7.0, "swiglu_alpha": 1.702},
            "3 × (attention + experts, silu)",
            "6 of 24, 2 per token, softmax scores, renormalised; SwiGLU clamped at 7, α 1.702",
            3 * 4,
        ),
    ],
)
def test_experts_count_as_total_and_as_active_parameters(
    options: dict[str, Any], layers: str, experts: str, idle: int, tmp_path: Path
):
    found = info(tmp_path, **(EXPERTS | options))
    lines = dict(describe_lines(open_checkpoint(tmp_path)))
    assert found.num_parameters == sum(p.numel() for p in make_model(**(EXPERTS | options)).parameters())
    assert found.num_active_parameters == found.num_parameters - idle * 3 * 48 * 24
    assert (lines["layers"], lines["experts"]) == (layers, experts)
    assert lines["parameters"] == f"{found.num_parameters:,}, of which a token uses {found.num_active_parameters:,}"


def test_biases_of_experts_and_sinks_of_the_softmax_are_told(tmp_path: Path):
    found = info(tmp_path, expert_bias=True, router_bias=True, softmax_sink=True, **EXPERTS)
    lines = dict(describe_lines(open_checkpoint(tmp_path)))
    assert lines["biases"] == "experts, router" and lines["factors"] == "a sink in the softmax of each head"
    of_one_expert = 3 * 48 * 24 + 2 * 24 + 48
    assert found.num_active_parameters == found.num_parameters - 3 * 4 * of_one_expert


def test_every_parameter_of_a_dense_model_is_active(tmp_path: Path):
    found = info(tmp_path)
    assert found.num_active_parameters == found.num_parameters
    assert "experts" not in dict(describe_lines(open_checkpoint(tmp_path)))


@pytest.mark.parametrize(
    ("overrides", "tokens_kept", "is_constant"),
    [
        ({}, 256, False),
        ({"sliding_window": 32, "sink_tokens": 4}, 36, True),
        ({"sliding_window": 1000}, 256, True),
        (
            {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
            256,
            False,
        ),
    ],
)
def test_only_a_window_in_every_layer_bounds_a_sequence(
    overrides: dict[str, Any], tokens_kept: int, is_constant: bool, tmp_path: Path
):
    found = info(tmp_path, **overrides)
    assert (found.tokens_kept, found.is_constant_memory) == (tokens_kept, is_constant)
    assert found.kv_bytes_full_sequence["float32"] == tokens_kept * found.kv_bytes_per_token["float32"]


def test_mixed_windows_are_told_by_layer(tmp_path: Path):
    layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
    make_model(sliding_window=32, layer_types=layer_types).save_pretrained(tmp_path)
    lines = dict(describe_lines(open_checkpoint(tmp_path)))
    assert lines["window"] == "by layer: full in 0; 32 in 1–2"
    assert lines["memory"].startswith("grows with the sequence: some layers have a window")


def test_options_of_families_are_told(tmp_path: Path):
    make_model(**VARIANTS["norms before and after"]).save_pretrained(tmp_path)
    lines = dict(describe_lines(open_checkpoint(tmp_path)))
    assert lines["position"] == "RoPE, θ 100 in 0; θ 10000 in 1; θ 100 in 2, context 256"
    assert lines["norms"] == "RMSNorm before and after each branch, ε 1e-06, of queries and keys, 1 + weight"
    assert lines["factors"] == "scores × 0.3, embeddings × 7, scores capped at 2, logits capped at 3"


def test_rotations_of_a_part_of_heads_and_of_some_layers_are_told(tmp_path: Path):
    make_model(use_xpos=False, **VARIANTS["rotation of a part, not in all layers"]).save_pretrained(tmp_path)
    lines = dict(describe_lines(open_checkpoint(tmp_path)))
    rope = "θ 10000 on 75% of each head"
    assert lines["position"] == f"RoPE, {rope} in 0; none in 1; {rope} in 2, context 256"
    assert lines["factors"] == "embeddings × 3, branches × 0.4, logits × 0.25"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**51, "2048.0 TiB")],
)
def test_sizes_for_people(num_bytes: int, text: str):
    assert size(num_bytes) == text
