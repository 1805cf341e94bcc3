"""Experts of gpt-oss in MXFP4: every number is decoded exactly; gates and ups are put in order; folders that are wrong
are refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations import mxfp4 as theirs

from stellarbyte.checkpoint.convert import convert, make_plan
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.hugging_face.mxfp4 import BLOCK, decoded
from stellarbyte.checkpoint.native import load_model
from tests.support.models.families import tiny_family
from tests.support.models.hugging_face import tiny_llama

STACKS = ("gate_up_proj", "down_proj")
EXPERTS = "model.layers.1.mlp.experts"


def value(code: int, scale: int) -> float:
    """Of e2m1 (a sign, two bits of exponent with bias 1, one of mantissa) times e8m0."""
    exponent, mantissa = code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return (-size if code & 8 else size) * 2.0 ** (scale - 127)


def encoded(codes: torch.Tensor) -> torch.Tensor:
    """Codes [..., K] as blocks [..., K / 32, 16], the earlier of two codes in a byte's lower half."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8).unflatten(-1, (-1, BLOCK // 2))


def random_packed(*shape: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales of random numbers of about 0.1, [*shape, K / 32, 16] and [*shape, K / 32]."""
    numbers = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, shape, generator=numbers)
    scales = torch.randint(121, 125, (*shape[:-1], shape[-1] // BLOCK), generator=numbers)
    return encoded(codes), scales.to(torch.uint8)


def test_every_code_of_every_scale_is_decoded_exactly() -> None:
    scales = torch.arange(253)
    codes = torch.arange(BLOCK).remainder(16).flip(0).expand(len(scales), -1)
    found = decoded(encoded(codes), scales.to(torch.uint8)[:, None])
    assert found.dtype == torch.bfloat16
    expected = [
        [value(code, scale) for code in row] for scale, row in zip(scales.tolist(), codes.tolist(), strict=True)
    ]
    assert found.tolist() == expected


@pytest.mark.parametrize("scale", [253, 255])
def test_scales_beyond_bfloat16_are_refused(scale: int) -> None:
    with pytest.raises(ValueError, match=rf"a scale of 2\^{scale - 127} is beyond bfloat16"):
        decoded(torch.zeros(1, 1, 16, dtype=torch.uint8), torch.tensor([[scale]], dtype=torch.uint8))


def test_numbers_are_those_of_transformers() -> None:
    blocks, scales = random_packed(3, 6, 96, seed=0)
    expected = theirs.convert_moe_packed_tensors(blocks, scales)  # [E, inputs, outputs]
    found = torch.stack([decoded(*pair) for pair in zip(blocks, scales, strict=True)])
    assert torch.equal(found, expected.transpose(1, 2))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_family(
        tmp_path_factory.mktemp("plain") / "source", "gpt_oss", intermediate_size=64, num_local_experts=4
    )


@pytest.fixture
def packed(plain: Path, tmp_path: Path) -> Path:
    """The folder with its stacks in MXFP4."""
    folder = tmp_path / "packed"
    folder.mkdir()
    for file in plain.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    edit(folder / "config.json", quantization_config=quantization)
    tensors = load_file(folder / "model.safetensors")
    for seed, name in enumerate(sorted(name for name in tensors if name.endswith(STACKS))):
        experts, num_inputs, num_outputs = tensors.pop(name).shape
        blocks, scales = random_packed(experts, num_outputs, num_inputs, seed=seed)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_gates_lie_above_ups_and_become_bfloat16(packed: Path) -> None:
    stored, planned = load_file(packed / "model.safetensors"), make_plan(packed).tensors
    for name in STACKS:
        blocks, scales = stored[f"{EXPERTS}.{name}_blocks"], stored[f"{EXPERTS}.{name}_scales"]
        expected = theirs.convert_moe_packed_tensors(blocks, scales).transpose(1, 2)
        if name == "gate_up_proj":
            expected = torch.cat((expected[:, 0::2], expected[:, 1::2]), dim=1)
        tensor = planned[f"{EXPERTS}.{name}"]
        assert (tensor.dtype, tensor.shape) == (torch.bfloat16, expected.shape)
        assert torch.equal(tensor.read(), expected)
    bias = stored[f"{EXPERTS}.gate_up_proj_bias"]
    found = planned[f"{EXPERTS}.gate_up_proj_bias"].read()
    assert torch.equal(found, torch.cat((bias[:, 0::2], bias[:, 1::2]), dim=1))


@torch.no_grad()
def test_a_folder_in_mxfp4_computes_what_its_decoded_weights_do(plain: Path, packed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain, local_files_only=True, attn_implementation="eager").eval()
    for name, tensor in load_file(packed / "model.safetensors").items():
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            scales = load_file(packed / "model.safetensors")[f"{stem}_scales"]
            model.get_parameter(stem).copy_(theirs.convert_moe_packed_tensors(tensor, scales))
    tokens = torch.arange(3, 43)[None]
    ours = load_model(convert(packed, tmp_path / "target", dtype=torch.float32))
    torch.testing.assert_close(ours(tokens).logits, model(tokens).logits, rtol=0, atol=1e-4)


def without(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def replaced(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


def in_the_place_of_packed(name: str, tensor: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
        if tensor is not None:
            tensors[name] = tensor

    return change


BYTES = torch.zeros(4, 128, 2, 16, dtype=torch.uint8)
REFUSED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "no scales": (without(f"{EXPERTS}.down_proj_scales"), f"lacks the tensor {EXPERTS}.down_proj_scales"),
    "no blocks": (without(f"{EXPERTS}.down_proj_blocks"), f"lacks the tensor {EXPERTS}.down_proj_blocks"),
    "no stack": (in_the_place_of_packed(f"{EXPERTS}.down_proj", None), f"{EXPERTS}.down_proj"),
    "blocks of floats": (replaced(f"{EXPERTS}.gate_up_proj_blocks", BYTES.float()), "as F32 [4, 128, 2, 16]; MXFP4 is"),
    "blocks of 8 bytes": (
        replaced(f"{EXPERTS}.gate_up_proj_blocks", BYTES[..., :8].contiguous()),
        "with scales of [4, 128, 2] it must be [4, 128, 2, 16]",
    ),
    "fewer experts": (
        lambda tensors: tensors.update(
            {
                f"{EXPERTS}.gate_up_proj_blocks": BYTES[:3].contiguous(),
                f"{EXPERTS}.gate_up_proj_scales": BYTES[:3, ..., 0].contiguous(),
            }
        ),
        "gate_up_proj as [3, 128, 64]; the config implies [4, 128, 64]",
    ),
    "a scale of NaN": (
        replaced(f"{EXPERTS}.gate_up_proj_scales", torch.full((4, 128, 2), 255, dtype=torch.uint8)),
        f"cannot be decoded: in {EXPERTS}.gate_up_proj_scales, a scale of 2^128 is beyond bfloat16.",
    ),
    "a bias of bytes": (replaced(f"{EXPERTS}.down_proj_bias", BYTES[0]), "down_proj_bias as U8"),
    "a bias of one dimension": (
        replaced(f"{EXPERTS}.down_proj_bias", torch.zeros(64)),
        "as F32 [64]; biases are [experts, outputs]",
    ),
    "a stack of two dimensions": (
        in_the_place_of_packed(f"{EXPERTS}.down_proj", torch.zeros(64, 64)),
        "as F32 [64, 64]; stacks are [experts, inputs, outputs]",
    ),
    "twice": (
        replaced(f"{EXPERTS}.down_proj", torch.zeros(4, 64, 64)),
        f"holds {EXPERTS}.down_proj twice: in MXFP4, and not",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_stacks_that_do_not_fit_are_refused_by_name(name: str, packed: Path, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    tensors = load_file(packed / "model.safetensors")
    change(tensors)
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        convert(packed, tmp_path / "target")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "target").exists()


def test_mxfp4_of_another_family_and_another_quantization_are_refused(packed: Path, tmp_path: Path) -> None:
    llama = tiny_llama(tmp_path / "llama")
    edit(llama / "config.json", quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(CheckpointError, match="is quantized with 'mxfp4', which is not supported"):
        make_plan(llama)
    edit(packed / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match="is quantized with 'gptq', which is not supported"):
        make_plan(packed)
