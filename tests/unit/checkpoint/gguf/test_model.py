"""Config and tensors of GGUF files: rope scaling, windows, dtypes; what is not supported is refused by name."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from stellarbyte.checkpoint.convert import convert, make_plan
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.native import load_config, open_checkpoint
from tests.support.models.families import tiny_family
from tests.support.models.gguf_files import write_gguf
from tests.support.models.hugging_face import tiny_llama, tiny_qwen2, tiny_qwen3_moe


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("gguf") / "source", hidden_size=64, intermediate_size=64)


def rope(file: Path) -> dict[str, Any]:
    found = make_plan(file).config.rope_parameters
    assert found is not None
    return found


def llama3_divisors(factor: float, low: float, high: float, original: int, head_dim: int = 16) -> np.ndarray:
    """rope_freqs.weight as a converter writes it, from transformers' own function."""
    scaling = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    parameters = {"rope_type": "llama3", "rope_theta": 10000.0, "original_max_position_embeddings": original, **scaling}
    config = LlamaConfig(hidden_size=head_dim * 4, num_attention_heads=4, rope_parameters=parameters)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    return (plain / scaled.double()).float().numpy()


def test_llama3_scaling_is_recognised(source: Path, tmp_path: Path):
    divisors = llama3_divisors(32.0, 1.0, 4.0, 8192)
    assert divisors.max() > 1
    file = write_gguf(tmp_path / "x.gguf", source, extra_tensors={"rope_freqs.weight": divisors})
    assert rope(file) == {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_other_baked_in_scaling_is_refused(source: Path, tmp_path: Path):
    divisors = llama3_divisors(8.0, 1.0, 2.0, 8192)
    file = write_gguf(tmp_path / "x.gguf", source, extra_tensors={"rope_freqs.weight": divisors})
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight holds a scaling that is not Llama 3's"):
        make_plan(file)


def test_linear_and_yarn_scaling(source: Path, tmp_path: Path):
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert rope(write_gguf(tmp_path / "linear.gguf", source, metadata=linear))["factor"] == 4.0
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
    }
    found = rope(write_gguf(tmp_path / "yarn.gguf", source, metadata=yarn))
    assert (found["rope_type"], found["factor"], found["original_max_position_embeddings"]) == ("yarn", 4.0, 32)
    assert "attention_factor" not in found
    scaled = yarn | {"llama.rope.scaling.attn_factor": 0.5}
    found = rope(write_gguf(tmp_path / "scaled.gguf", source, metadata=scaled))
    assert found["attention_factor"] == pytest.approx(0.5 * (1 + 0.1 * math.log(4)))


def test_window_and_numbers_of_the_config(source: Path, tmp_path: Path):
    file = write_gguf(tmp_path / "x.gguf", source, metadata={"llama.attention.sliding_window": 8})
    config = make_plan(file).config
    assert config.windows == (8, 8, 8)
    assert config.rms_norm_eps == 1e-6
    assert (config.bos_token_id, config.eos_token_id, config.use_xpos) == (0, [2, 0], False)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "longrope": ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type 'longrope'"),
    "experts without their number": ({"llama.expert_count": 8}, "it has no llama.expert_used_count"),
    "experts without matrices": (
        {"llama.expert_count": 8, "llama.expert_used_count": 2},
        "moe_layers ([]) must be",
    ),
    "expert groups": ({"llama.expert_count": 8, "llama.expert_group_count": 2}, "llama.expert_group_count is not"),
    "expert scores": ({"llama.expert_count": 8, "llama.expert_gating_func": 2}, "expert_gating_func 2 is not"),
    "partial rotation": ({"llama.rope.dimension_count": 4}, "rotation of only a part"),
    "key width": ({"llama.attention.value_length": 4}, "keys and values of different width"),
    "kv heads by layer": ({"llama.attention.head_count_kv": [2, 1, 2]}, "cannot be converted"),
    "logit scale": ({"llama.logit_scale": 0.5}, "llama.logit_scale is not supported"),
    "absent field": ({"llama.context_length": None}, "it has no llama.context_length"),
    "split": ({"split.count": 3}, "one part of a split GGUF"),
    "layers": ({"llama.block_count": 4}, "llama.block_count is 4, but there are tensors of 3 layers"),
    "width": ({"llama.feed_forward_length": 65}, r"mlp.gate_proj.weight as [64, 64]; the config implies [65, 64]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_metadata_is_refused_by_name(name: str, source: Path, tmp_path: Path):
    metadata, message = REFUSED[name]
    with pytest.raises(CheckpointError) as caught:
        convert(write_gguf(tmp_path / "x.gguf", source, metadata=metadata), tmp_path / "target")
    assert message in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.gguf"]


def test_unsupported_architecture_and_tensors_are_refused(source: Path, tmp_path: Path):
    file = write_gguf(tmp_path / "x.gguf", source, architecture="gemma3")
    with pytest.raises(CheckpointError, match="the architecture 'gemma3'; supported are llama, qwen2"):
        make_plan(file)
    extra = {"blk.0.ssm_a.weight": np.zeros(4, dtype=np.float32)}
    with pytest.raises(CheckpointError, match=r"holds the tensor blk\.0\.ssm_a\.weight, which is not supported"):
        make_plan(write_gguf(tmp_path / "y.gguf", source, extra_tensors=extra))
    old = {"blk.0.ffn_gate.0.weight": np.zeros((4, 4), dtype=np.float32)}  # Mixtral as files had it in early 2024
    with pytest.raises(CheckpointError, match=r"holds the tensor blk\.0\.ffn_gate\.0\.weight, which is not supported"):
        make_plan(write_gguf(tmp_path / "z.gguf", source, extra_tensors=old))


@pytest.mark.parametrize("architecture", ["qwen3next", "qwen35", "qwen35moe"])
def test_linear_attention_is_refused_by_name(architecture: str, source: Path, tmp_path: Path):
    file = write_gguf(tmp_path / "x.gguf", source, architecture=architecture)
    with pytest.raises(CheckpointError) as caught:
        convert(file, tmp_path / "target")
    assert str(caught.value).endswith("whose linear-attention layers (Gated DeltaNet) are not supported.")
    assert not (tmp_path / "target").exists()


def test_window_of_a_qwen_file_is_refused(tmp_path: Path):
    """Which layers have it is not in the file."""
    folder = tiny_qwen2(tmp_path / "source")
    file = write_gguf(tmp_path / "x.gguf", folder, architecture="qwen2", metadata={"qwen2.attention.sliding_window": 8})
    with pytest.raises(CheckpointError, match=r"qwen2\.attention\.sliding_window is not supported"):
        make_plan(file)


@pytest.mark.parametrize(
    ("kind", "dtype", "stored"),
    [
        (GGMLQuantizationType.Q8_0, None, "F32"),
        (GGMLQuantizationType.F16, None, "F16"),
        (GGMLQuantizationType.F32, None, "F32"),
        (GGMLQuantizationType.Q4_0, torch.bfloat16, "BF16"),
    ],
)
def test_dtype_of_the_target(
    kind: GGMLQuantizationType, dtype: torch.dtype | None, stored: str, source: Path, tmp_path: Path
):
    target = convert(write_gguf(tmp_path / "x.gguf", source, kind=kind), tmp_path / "target", dtype=dtype)
    assert {info.dtype for info in open_checkpoint(target).tensors.values()} == {stored}
    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    assert load_config(target).dtype == names[stored]


def test_experts_of_a_file(tmp_path: Path):
    """Stacks that are joined already, gates that are renormalised or not, float16 with routers in float32."""
    folder = tiny_qwen3_moe(tmp_path / "source", hidden_size=64, moe_intermediate_size=32)
    file = write_gguf(tmp_path / "x.gguf", folder, architecture="qwen3moe", kind=GGMLQuantizationType.F16)
    plan = make_plan(file)
    assert (plan.config.dtype, plan.config.moe_layers, plan.config.norm_topk_prob) == (torch.float16, [1, 2], True)
    metadata = {"qwen3moe.expert_weights_norm": False}
    file = write_gguf(tmp_path / "y.gguf", folder, architecture="qwen3moe", metadata=metadata)
    assert not make_plan(file).config.norm_topk_prob
    names = [f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    gate_up, down = (make_plan(file).tensors[name].read() for name in names)
    matrices = load_file(folder / "model.safetensors")
    for e in range(8):
        kinds = ("gate", "up", "down")
        gate, up, own_down = (matrices[f"model.layers.1.mlp.experts.{e}.{kind}_proj.weight"] for kind in kinds)
        assert torch.equal(gate_up[e], torch.cat((gate, up))) and torch.equal(down[e], own_down)


def test_mxfp4_is_decoded_exactly_and_stored_as_bfloat16(tmp_path: Path):
    """Beside matrices in bfloat16, as in files of gpt-oss; its gates and ups are apart there."""
    folder = tiny_family(tmp_path / "source", "gpt_oss", intermediate_size=64)
    file = write_gguf(tmp_path / "x.gguf", folder, architecture="gpt-oss", kind=GGMLQuantizationType.MXFP4)
    plan = make_plan(file)
    tensor = plan.tensors["model.layers.1.mlp.experts.gate_up_proj"]
    assert plan.config.dtype == tensor.dtype == torch.bfloat16
    stack = load_file(folder / "model.safetensors")["model.layers.1.mlp.experts.gate_up_proj"].transpose(1, 2)
    rows = torch.cat((stack[:, 0::2], stack[:, 1::2]), dim=1).contiguous().numpy()
    packed = quantize(rows, GGMLQuantizationType.MXFP4)
    assert np.array_equal(tensor.read().float().numpy(), dequantize(packed, GGMLQuantizationType.MXFP4))


def test_windows_of_gpt_oss_alternate_and_its_yarn_is_not_truncated(tmp_path: Path):
    folder = tiny_family(tmp_path / "source", "gpt_oss")
    config = make_plan(write_gguf(tmp_path / "x.gguf", folder, architecture="gpt-oss")).config
    assert config.windows == (8, None, 8) and config.softmax_sink and config.expert_bias
    assert config.rope_parameters is not None and config.rope_parameters["truncate"] is False
    metadata = {"gpt-oss.attention.sliding_window": None}
    config = make_plan(write_gguf(tmp_path / "y.gguf", folder, architecture="gpt-oss", metadata=metadata)).config
    assert config.windows == (None, None, None)
