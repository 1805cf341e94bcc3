"""Quantized folders as users meet them: what is refused and how, what a converted checkpoint remembers."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stellarbyte import ByteTransformer
from stellarbyte.checkpoint.convert import convert, make_plan
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.info import describe, describe_lines
from stellarbyte.checkpoint.native import load_model, load_quantized, open_checkpoint
from stellarbyte.checkpoint.source import resolve_model
from tests.support.models.families import tiny_family
from tests.support.models.quantized import FORMATS, edit_config, quantize_folder, write_quantized

MODULE = "model.layers.1.mlp.up_proj"
Change = Callable[[dict[str, torch.Tensor]], object]


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    return dict(FORMATS[name].config) | changes


REFUSED_CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "another method": ("awq", {"quant_method": "hqq"}, "with 'hqq', which is not supported; this model may be in awq"),
    "no method": ("awq", {"quant_method": None}, "is quantized with None, which is not supported"),
    "gemv": ("awq", config_of("awq", version="gemv"), "the layout 'gemv' is not supported, only 'gemm'"),
    "awq of 3 bits": ("awq", config_of("awq", bits=3), "3 bits are not supported, only 4"),
    "awq without zeros": ("awq", config_of("awq", zero_point=False), "zero_point false is not supported"),
    "marlin": ("gptq", config_of("gptq", checkpoint_format="marlin"), "checkpoint_format 'marlin' is not supported"),
    "gptq of 5 bits": ("gptq", config_of("gptq", bits=5), "5 bits are not supported, only 2, 3, 4, 8"),
    "gptq without bits": ("gptq", config_of("gptq", bits=None), "None bits are not supported"),
    "e5m2": ("fp8 blocks", config_of("fp8 blocks", fmt="e5m2"), "fmt 'e5m2' is not supported, only 'e4m3'"),
    "a block of one number": ("fp8 blocks", config_of("fp8 blocks", weight_block_size=[9]), "block size [9] is not"),
    "nvfp4": (
        "compressed-tensors W4A16",
        config_of("compressed-tensors W4A16", format="nvfp4-pack-quantized"),
        "the format 'nvfp4-pack-quantized' is not supported",
    ),
    "sparse": (
        "compressed-tensors W4A16",
        config_of("compressed-tensors W4A16", sparsity_config={"format": "sparse-24-bitmask"}),
        "the sparsity format 'sparse-24-bitmask' is not supported",
    ),
    "rotations": (
        "compressed-tensors W4A16",
        config_of("compressed-tensors W4A16", transform_config={"config_groups": {"R1": {}}}),
        "transform_config (rotations of activations) is not supported",
    ),
    "no groups": (
        "compressed-tensors W4A16",
        config_of("compressed-tensors W4A16", config_groups=None),
        "its config_groups do not say how weights are quantized",
    ),
    "4 bits said to be 8": ("gptq", config_of("gptq", bits=8), f"{MODULE.replace('1.mlp.up', '0.mlp.down')}"),
}  # fmt: skip


def write(folder: Path, name: str) -> Path:
    return write_quantized(folder, name)[0]


def refusal(folder: Path, target: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert(folder, target)
    assert not target.exists() and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_other_layouts_are_refused_by_name(case: str, tmp_path: Path) -> None:
    name, quantization, message = REFUSED_CONFIGS[case]
    folder = write(tmp_path, name)
    edit_config(folder, quantization_config=quantization)
    found = refusal(folder, tmp_path / "target")
    assert message in found and str(folder) in found


def without(ending: str) -> Change:
    return lambda tensors: tensors.pop(f"{MODULE}{ending}")


def replaced(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def replace(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{MODULE}{ending}"] = change(tensors[f"{MODULE}{ending}"]).contiguous()

    return replace


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.float().fill_(value).to(tensor.dtype)


REFUSED_TENSORS: dict[str, tuple[str, Change, str]] = {
    "awq without zeros": ("awq", without(".qzeros"), f"lacks the tensor {MODULE}.qzeros"),
    "awq of floats": ("awq", replaced(".qweight", torch.Tensor.float), f"{MODULE}.qweight as F32 [128, 32]; it must"),
    "awq with fewer zeros": (
        "awq", replaced(".qzeros", lambda t: t[:-1]), f"{MODULE}.qzeros as I32 [3, 32]; it must be I32 [4, 32]"
    ),
    "awq with scales of bytes": ("awq", replaced(".scales", torch.Tensor.byte), f"{MODULE}.scales as U8"),
    "awq with a scale of NaN": ("awq", replaced(".scales", filled(float("nan"))), f"{MODULE}.scales holds NaN"),
    "awq with 5 groups": (
        "awq",
        lambda tensors: (
            replaced(".scales", lambda t: t.repeat(2, 1)[:5])(tensors),
            replaced(".qzeros", lambda t: t.repeat(2, 1)[:5])(tensors),
        ),
        f"{MODULE}.scales holds 5 groups for 128 inputs",
    ),
    "awq of fewer outputs": (
        "awq",
        lambda tensors: [
            replaced(f".{part}", lambda t: t[:, : t.shape[1] // 2])(tensors) for part in ("qweight", "qzeros", "scales")
        ],
        f"{MODULE}.weight as [128, 128]; the config implies [256, 128]",
    ),
    "gptq of another group": ("gptq", replaced(".g_idx", filled(4)), f"{MODULE}.g_idx names groups other than 0 to 3"),
    "gptq of negative groups": ("gptq", replaced(".g_idx", filled(-1)), f"{MODULE}.g_idx names groups other than"),
    "gptq with fewer inputs": ("gptq", replaced(".g_idx", lambda t: t[:64]), f"{MODULE}.g_idx as I32 [64]; it must be"),
    "gptq with zero points of 0": ("gptq", replaced(".qzeros", filled(-1)), "programs read as zero points of 0 or"),
    "no shape": ("compressed-tensors W4A16", without(".weight_shape"), f"lacks the tensor {MODULE}.weight_shape"),
    "another shape": (
        "compressed-tensors W4A16",
        replaced(".weight_shape", lambda t: t * 2),
        f"{MODULE}.weight_packed of [256, 16] does not fit a weight of [512, 256]",
    ),
    "a negative shape": ("compressed-tensors W4A16", replaced(".weight_shape", lambda t: -t), "does not fit a weight"),
    "act-order without groups": (
        "compressed-tensors W4A16 act-order",
        replaced(".weight_g_idx", filled(100)),
        f"{MODULE}.weight_g_idx names groups other than 0 to 3",
    ),
    "int8 without scales": (
        "compressed-tensors W8A8", without(".weight_scale"), f"holds {MODULE}.weight as I8; only F64, F32, F16, BF16"
    ),
    "fp8 with a code of NaN": (
        "fp8 blocks",
        replaced(".weight", lambda t: torch.full(t.shape, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)),
        f"{MODULE}.weight holds NaN",
    ),
    "fp8 with other blocks": (
        "fp8 blocks",
        replaced(".weight_scale_inv", lambda _: torch.ones(3, 3)),
        f"{MODULE}.weight_scale_inv of [3, 3] does not fit a weight of [256, 128]",
    ),
    "fp8 with a bias of fp8": (
        "fp8 blocks",
        lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)}),
        "model.norm.weight as F8_E4M3",
    ),
    "nf4 without JSON": (
        "nf4",
        replaced(".weight.quant_state.bitsandbytes__nf4", lambda t: t[:-1]),
        "quant_state.bitsandbytes__nf4 is not the JSON that bitsandbytes writes",
    ),
    "nf4 with fewer factors": ("nf4", replaced(".weight.absmax", lambda t: t[:-1]), ".weight.absmax as F32 [511]"),
    "nf4 with fewer bytes": ("nf4", replaced(".weight", lambda t: t[:-1]), f"{MODULE}.weight as U8 [16383, 1]"),
    "nf4 with codes of NaN": (
        "nf4", replaced(".weight.quant_map", filled(float("nan"))), f"{MODULE}.weight decodes to NaN or infinity"
    ),
    "nf4 without outer factors": (
        "nf4, double", without(".weight.nested_absmax"), f"lacks the tensor {MODULE}.weight.nested_absmax"
    ),
    "int8 with factors of infinity": ("LLM.int8", replaced(".SCB", filled(float("inf"))), f"{MODULE}.SCB holds NaN or"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(case: str, tmp_path: Path) -> None:
    name, change, message = REFUSED_TENSORS[case]
    folder = write(tmp_path, name)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    assert message in refusal(folder, tmp_path / "target")


def test_a_state_with_a_shape_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "nf4")
    tensors, name = load_file(folder / "model.safetensors"), f"{MODULE}.weight.quant_state.bitsandbytes__nf4"
    for state in ({"shape": [2**40, 2**40], "blocksize": 64}, {"shape": [256], "blocksize": 64}, [], {"blocksize": 0}):
        raw = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        save_file(tensors | {name: raw}, folder / "model.safetensors")
        assert "is not the JSON that bitsandbytes writes" in refusal(folder, tmp_path / "target")


def test_empty_biases_are_left_out_and_others_refused(tmp_path: Path) -> None:
    """AutoGPTQ stores zeros for linears without a bias."""
    folder = write_quantized(tmp_path, "gptq", attention_bias=False)[0]
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.0.self_attn.q_proj.bias"
    save_file(tensors | {name: torch.zeros(128, dtype=torch.float16)}, folder / "model.safetensors")
    assert name not in open_checkpoint(convert(folder, tmp_path / "a")).tensors
    save_file(tensors | {name: torch.ones(128)}, folder / "model.safetensors")
    assert f"holds the tensor {name}, which the config does not imply" in refusal(folder, tmp_path / "b")


def test_zero_points_that_are_all_zero_change_nothing(tmp_path: Path) -> None:
    """Early releases of compressed-tensors store them for symmetric weights, too."""
    folder, plain = write_quantized(tmp_path, "compressed-tensors FP8")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        zeros = torch.zeros(tensors[name].shape).to(torch.float8_e4m3fn)
        tensors[name.replace("weight_scale", "weight_zero_point")] = zeros
    save_file(tensors, folder / "model.safetensors")
    target = convert(folder, tmp_path / "target")
    assert {matrix.kind for matrix in open_checkpoint(target).quantized.values()} == {"fp8"}
    numbers = load_file(plain / "model.safetensors")[f"{MODULE}.weight"]
    torch.testing.assert_close(load_model(target).get_parameter(f"{MODULE}.weight"), numbers, rtol=3e-7, atol=1e-9)


def test_folders_that_only_say_so_are_refused(tmp_path: Path) -> None:
    _, plain = write_quantized(tmp_path, "awq")
    edit_config(plain, quantization_config=config_of("awq"))
    assert "says that it is quantized with 'awq', but no tensor is" in refusal(plain, tmp_path / "target")


def test_info_names_the_format_and_what_is_not_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path, "compressed-tensors W8A8")
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(convert(folder, tmp_path / "target"))
    assert f"warning: {folder}: activations are not quantized, only weights." in caplog.text
    lines = dict(describe_lines(checkpoint))
    assert lines["converted"] == (
        "from compressed-tensors int-quantized, int8, as quantized; activations are not quantized, only weights"
    )
    kept = "12 matrices in int8, groups of 128; 2 matrices in int8, groups of 256; others in float32"
    assert lines["on disk"].endswith(f"({kept})")
    assert describe(checkpoint).num_parameters == load_model(checkpoint.path).num_parameters()


def test_scales_of_a_kv_cache_are_left_out_with_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path, "compressed-tensors FP8")
    tensors = load_file(folder / "model.safetensors")
    for ending in ("k_scale", "v_scale"):
        tensors[f"model.layers.0.self_attn.{ending}"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, quantization_config=config_of("compressed-tensors FP8", kv_cache_scheme={"num_bits": 8}))
    convert(folder, tmp_path / "target")
    assert "the scales of a quantized KV cache are not used" in caplog.text


def test_a_dtype_dequantizes_everything(tmp_path: Path) -> None:
    folder, plain = write_quantized(tmp_path, "gptq")
    checkpoint = open_checkpoint(convert(folder, tmp_path / "target", dtype=torch.bfloat16))
    assert not checkpoint.quantized and {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
    numbers = load_file(plain / "model.safetensors")
    found = load_model(checkpoint.path).state_dict()
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in numbers.items())
    assert "dequantized" in dict(describe_lines(checkpoint))["converted"]


def test_dequantized_checkpoints_are_float32_throughout(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, "nf4", dtype=torch.bfloat16)[0]
    checkpoint = open_checkpoint(convert(folder, tmp_path / "target"))
    assert {info.dtype for info in checkpoint.tensors.values()} == {"F32"}


def test_kept_checkpoints_are_small_and_load_in_float32(tmp_path: Path) -> None:
    """The other tensors keep their 16 bits on the disk; in 16 bits the numbers of the matrices would be rounded."""
    folder, plain = write_quantized(tmp_path, "awq", dtype=torch.bfloat16)
    target = convert(folder, tmp_path / "target", max_shard_bytes=100_000)
    checkpoint = open_checkpoint(target)
    assert len(checkpoint.files) > 1 and checkpoint.tensors["model.embed_tokens.weight"].dtype == "BF16"
    num_bytes = sum(info.num_bytes for info in checkpoint.tensors.values())
    assert num_bytes < (plain / "model.safetensors").stat().st_size / 4
    model = load_model(target)
    assert model.dtype == torch.float32
    numbers = load_file(plain / "model.safetensors")[f"{MODULE}.weight"]
    assert torch.equal(model.get_parameter(f"{MODULE}.weight"), numbers)
    bare, kept = load_quantized(target, dtype=torch.float32)
    assert bare.get_parameter(f"{MODULE}.weight").is_meta and kept[f"{MODULE}.weight"].group_size == 32


def test_transformers_finds_no_weights_instead_of_making_some_up(tmp_path: Path) -> None:
    target = convert(write(tmp_path, "awq"), tmp_path / "target")
    with pytest.raises(OSError, match="no file named"):
        ByteTransformer.from_pretrained(target)


def test_fused_linears_are_split_and_rotated_rows_reordered(tmp_path: Path) -> None:
    """Phi-3's qkv_proj and gate_up_proj, with a rotation of a part of each head."""
    plain = tiny_family(tmp_path / "plain", "phi3 longrope", intermediate_size=96)
    folder = tiny_family(tmp_path / "folder", "phi3 longrope", intermediate_size=96)
    quantize_folder(folder, plain, FORMATS["awq"])
    found, expected = convert(folder, tmp_path / "target"), convert(plain, tmp_path / "expected")
    assert len(open_checkpoint(found).quantized) == 3 * 7
    numbers = load_model(expected).state_dict()
    assert all(torch.equal(tensor, numbers[name]) for name, tensor in load_model(found).state_dict().items())


@pytest.mark.parametrize(("name", "form"), [("awq", "int4"), ("fp8 blocks", "fp8"), ("nf4", None)])
def test_experts_are_stacked(name: str, form: str | None, tmp_path: Path) -> None:
    folder, plain = write_quantized(tmp_path, name, experts=True, moe_intermediate_size=128, head_dim=32)
    found, expected = convert(folder, tmp_path / "target"), convert(plain, tmp_path / "expected")
    stack = "model.layers.1.mlp.experts.gate_up_proj"
    kept = open_checkpoint(found).quantized
    assert (kept[stack].kind if kept else None) == form
    numbers = load_model(expected).state_dict()
    for key, tensor in load_model(found).state_dict().items():
        torch.testing.assert_close(tensor, numbers[key], rtol=3e-7, atol=1e-9)


def test_experts_that_are_not_alike_are_dequantized(tmp_path: Path) -> None:
    folder, plain = write_quantized(tmp_path, "awq", experts=True, moe_intermediate_size=128)
    tensors, numbers = load_file(folder / "model.safetensors"), load_file(plain / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj"
    for ending in (".qweight", ".qzeros", ".scales"):
        del tensors[f"{name}{ending}"]
    save_file(tensors | {f"{name}.weight": numbers[f"{name}.weight"]}, folder / "model.safetensors")
    found = convert(folder, tmp_path / "target")
    kept = open_checkpoint(found).quantized
    assert kept and not any(".experts." in key for key in kept)
    stack = load_model(found).get_parameter("model.layers.1.mlp.experts.gate_up_proj")
    assert torch.equal(stack[3, 128:], numbers[f"{name}.weight"])


CORRUPT: dict[str, tuple[Change, str]] = {
    "no scales": (lambda t: t.pop(f"{MODULE}.weight.scales"), f"lacks the tensor {MODULE}.weight.scales"),
    "no zeros": (lambda t: t.pop(f"{MODULE}.weight.zeros"), f"lacks the tensor {MODULE}.weight.zeros"),
    "codes of floats": (
        lambda t: t.update({f"{MODULE}.weight.codes": torch.zeros(256, 64)}),
        f"{MODULE}.weight.codes as F32, not one of U8, I8, F8_E4M3",
    ),
    "other groups": (
        lambda t: t.update({f"{MODULE}.weight.scales": torch.zeros(256, 3)}),
        f"{MODULE}.weight.scales as F32 [256, 3], which does not fit codes of [256, 64]",
    ),
    "other zeros": (
        lambda t: t.update({f"{MODULE}.weight.zeros": torch.zeros(256, 2, dtype=torch.uint8)}),
        f"{MODULE}.weight.zeros as U8 [256, 2]; it must be U8 or F16 [256, 4]",
    ),
    "fewer rows": (
        lambda t: [t.update({key: t[key][:-1].contiguous()}) for key in list(t) if key.startswith(f"{MODULE}.weight")],
        f"{MODULE}.weight as [255, 128]; the config implies [256, 128]",
    ),
    "codes of a norm": (
        lambda t: t.update({"model.norm.weight.codes": torch.zeros(128, dtype=torch.int8)}),
        "model.norm.weight.codes; this parameter cannot be quantized",
    ),
    "twice": (
        lambda t: t.update({f"{MODULE}.weight": torch.zeros(256, 128)}),
        f"{MODULE}.weight.codes, but {MODULE}.weight is there, too",
    ),
    "zeros alone": (
        lambda t: t.update({"model.norm.weight.zeros": torch.zeros(128, dtype=torch.uint8)}),
        "holds the tensor model.norm.weight.zeros, which the config does not imply",
    ),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_checkpoints_whose_parts_do_not_fit_are_refused(case: str, tmp_path: Path) -> None:
    change, message = CORRUPT[case]
    target = convert(write(tmp_path, "awq"), tmp_path / "target")
    tensors = load_file(target / "quantized.safetensors")
    change(tensors)
    save_file(tensors, target / "quantized.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(target)
    assert message in str(caught.value)


def test_a_converted_model_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STELLARBYTE_CACHE", str(tmp_path / "cache"))
    folder = write(tmp_path, "awq")
    found = resolve_model(str(folder))
    assert resolve_model(str(folder)) == found == resolve_model(str(found))
    assert make_plan(folder).origin is not None
