"""Native checkpoint folders: what is wrong with one is said in a sentence, its hash is right, it loads whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.native import load_config, load_model, open_checkpoint
from stellarbyte.checkpoint.shapes import expected_shapes
from tests.support.models.byte_transformer import assert_same_model, make_config, make_model
from tests.support.models.hugging_face import tiny_qwen2

CONFIGS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "qk_norm": True},
    {"layer_scale_init": 0.1, "xpos_learnable_scale": True},
    {"parallel_residual": True, "num_key_value_heads": 1, "head_dim": 20},
    {"deepnorm": True, "sliding_window": 8, "sink_tokens": 2},
]


@pytest.mark.parametrize("overrides", CONFIGS)
def test_saved_models_load_whole(overrides: dict[str, Any], tmp_path: Path):
    """Whatever save_pretrained writes is what expected_shapes expects and load_model loads."""
    model = make_model(**overrides)
    model.save_pretrained(tmp_path)
    assert list(open_checkpoint(tmp_path).tensors.keys() ^ expected_shapes(make_config(**overrides)).keys()) == []
    loaded = load_model(tmp_path)
    tokens = torch.arange(20)[None]
    assert_same_model(loaded, model, tokens)
    assert not loaded.training
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_load_model_casts_every_parameter(tmp_path: Path):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    return convert(tiny_qwen2(folder / "source"), folder / "whole", max_shard_bytes=50_000)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(content))

    return edit


def edit_first_shard(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = min(folder.glob("*.safetensors"))
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return edit


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def cut_last_shard(folder: Path) -> None:
    file = max(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])


def lengthen_last_shard(folder: Path) -> None:
    file = max(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes() + b"x")


EMBEDDING = "model.embed_tokens.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "does not exist"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    "config is not JSON": (write("config.json", b"{"), "config.json is not valid JSON"),
    "config is a list": (write("config.json", b"[]"), "does not hold a JSON object"),
    "another model": (
        edit_config(model_type="llama"),
        "model of type 'llama', not a ByteTransformer; convert it first",
    ),
    "impossible config": (edit_config(head_dim=7), "config.json is not valid: head_dim (7) must be even"),
    "config of wrong type": (edit_config(hidden_size="wide"), "config.json is not valid"),
    "missing shard": (lambda folder: max(folder.glob("*.safetensors")).unlink(), "is missing; model.safetensors.index"),
    "no weights": (
        lambda folder: [file.unlink() for file in folder.glob("model*")],
        "has no weights: neither model.safetensors nor",
    ),
    "index is nonsense": (write("model.safetensors.index.json", b"{}"), "has no usable weight_map"),
    "index leads outside": (
        write("model.safetensors.index.json", b'{"weight_map": {"x": "../x.safetensors"}}'),
        "has no usable weight_map",
    ),
    "cut shard": (cut_last_shard, "but its header describes"),
    "longer shard": (lengthen_last_shard, "but its header describes"),
    "empty shard": (lambda folder: min(folder.glob("*.safetensors")).write_bytes(b""), "it is cut short"),
    "missing tensor": (edit_first_shard(lambda tensors: tensors.pop(EMBEDDING)), f"does not hold {EMBEDDING}"),
    "unexpected tensor": (
        edit_first_shard(lambda tensors: tensors.update(stray=torch.zeros(2))),
        "holds the tensor stray, which the config does not imply",
    ),
    "doubled tensor": (
        edit_first_shard(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(32)})),
        "holds model.norm.weight, which another shard holds too",
    ),
    "shape": (
        edit_first_shard(lambda tensors: tensors.update({EMBEDDING: torch.zeros(7, 32)})),
        f"holds {EMBEDDING} as [7, 32]; the config implies [300, 32]",
    ),
    "dtype": (
        edit_first_shard(lambda tensors: tensors.update({EMBEDDING: torch.zeros(300, 32, dtype=torch.int8)})),
        f"holds {EMBEDDING} as I8",
    ),
    "another depth": (
        edit_config(num_hidden_layers=2, layer_types=None),
        "holds model.layers.2.self_attn.q_proj.weight and 11 other tensors, which the config does not imply",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_precise_sentence(name: str, whole: Path, tmp_path: Path):
    folder = shutil.copytree(whole, tmp_path / "damaged")
    damage, message = DAMAGE[name]
    damage(folder)
    for use in (open_checkpoint, load_model):
        with pytest.raises(CheckpointError) as caught:
            use(folder)
        assert message in str(caught.value)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_header_that_is_nonsense_is_refused(whole: Path, tmp_path: Path):
    """Any byte of a safetensors header may be wrong; nothing but CheckpointError comes of it."""
    folder = shutil.copytree(whole, tmp_path / "damaged")
    file = min(folder.glob("*.safetensors"))
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for at in range(0, header, 3):
        damaged = bytearray(content)
        damaged[at] ^= 0x15
        file.write_bytes(damaged)
        try:
            open_checkpoint(folder)
        except CheckpointError:
            continue
        assert damaged[at] ^ 0x15 in b" ptformat"  # the free text of __metadata__, and padding


def test_config_round_trip(tmp_path: Path):
    config = make_config(sliding_window=8, sink_tokens=4, qk_norm=True)
    config.save_pretrained(tmp_path)
    assert load_config(tmp_path).to_dict() == config.to_dict() | {
        "transformers_version": load_config(tmp_path).transformers_version
    }
