"""The files of runs: each wrong value is one sentence that names it."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from stellarbyte.train.config.prepare import Prepare
from stellarbyte.train.config.presets import PRESETS
from stellarbyte.train.config.run import LoraRun, Pretrain, Sft
from stellarbyte.train.config.tokenizer import TrainTokenizer
from stellarbyte.train.config.yaml_file import Section, read_yaml
from stellarbyte.train.errors import TrainError
from tests.support.servers.server_process import ROOT

PRETRAIN: dict[str, Any] = {
    "run": {"dir": "runs/poet", "seed": 1, "track": ["tensorboard"]},
    "model": {"preset": "poet-30m", "sliding_window": 128},
    "data": {"shards": "data/poet", "sequence": 512, "packing": True},
    "train": {"batch_tokens": 262144, "micro_batch": 64, "epochs": 8, "lr": 0.003, "schedule": "cosine_with_restarts"},
}
CHATS: dict[str, Any] = {
    "run": {"dir": "runs/chat"},
    "model": {"path": "demo", "residual_dropout": 0.1},
    "data": {"chats": ["chats.jsonl"], "sequence": 512},
    "train": {"batch_tokens": 4096, "micro_batch": 8, "lr": 1e-3},
}


def read(folder: Path, kind: type[Section], content: dict[str, Any], *overrides: str) -> Any:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return read_yaml(file, kind, overrides)


def test_values_overrides_and_defaults(tmp_path: Path) -> None:
    found = read(tmp_path, Pretrain, PRETRAIN, "train.ema=0.99", "model.qk_norm=false")
    assert found.train.ema == 0.99 and found.train.cycles == 1 and found.stop.nan and found.stop.patience is None
    assert found.model.fields == {"sliding_window": 128, "qk_norm": False}
    assert read(tmp_path, LoraRun, CHATS, "lora.r=4").lora.r == 4
    assert read(tmp_path, Sft, CHATS).model.fields == {"residual_dropout": 0.1}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_size_of_their_names(preset: str) -> None:
    from stellarbyte.checkpoint.shapes import expected_shapes
    from stellarbyte.config import ByteModelConfig

    shapes = expected_shapes(ByteModelConfig(vocab_size=8192, **PRESETS[preset]))
    millions = sum(math.prod(shape) for shape in shapes.values()) / 1e6
    assert round(millions) == int(preset.rpartition("-")[2].removesuffix("m"))


REFUSED: list[tuple[type[Section], dict[str, Any], str, str]] = [
    *(
        (LoraRun, CHATS, f"lora.invocation={value}", "must be a text or a list of 1 to 256 token ids")
        for value in ("[]", "''", "[1.5]", "[-1]", "[true]", "5")
    ),
    (
        LoraRun,
        CHATS | {"lora": {"dora": True}},
        "lora.invocation=hi",
        "lora.dora cannot be combined with lora.invocation",
    ),
    (Pretrain, PRETRAIN, "data.sequense=3", "data.sequense is unknown; did you mean sequence?"),
    (Pretrain, PRETRAIN, "model.sliding_windo=3", "model.sliding_windo is unknown; did you mean sliding_window?"),
    (Pretrain, PRETRAIN, "model.vocab_size=3", "model.vocab_size is unknown"),
    (Pretrain, PRETRAIN, "model.preset=poem", "preset 'poem' is not one of tiny-1m, poet-30m"),
    (Pretrain, PRETRAIN, "model.path=x", "give only one of path and preset"),
    (Pretrain, PRETRAIN, "model={}", "give path, or a preset"),
    (Pretrain, PRETRAIN, "model.sliding_window=wide", "model.sliding_window ('wide')"),
    (Sft, CHATS, "model.hidden_size=64", "hidden_size is fixed by the checkpoint at demo"),
    (Sft, CHATS, "model.path=null", "model.path is missing"),
    (Sft, CHATS, "model={preset: poet-30m}", "model.path is missing"),
    (Pretrain, PRETRAIN, "train.ema=1", "train.ema (1) should be less than 1"),
    (Pretrain, PRETRAIN, "train.label_smoothing=1", "train.label_smoothing (1) should be less than 1"),
    (Pretrain, PRETRAIN, "train.recompute_every=0", "train.recompute_every (0) should be greater than or equal to 1"),
    (Pretrain, PRETRAIN, "train.schedule=cosin", "train.schedule ('cosin') should be 'cosine'"),
    (Pretrain, PRETRAIN, "train={batch_tokens: 8, micro_batch: 1, lr: 1, cycles: 2}", "needs schedule cosine_with_res"),
    (Pretrain, PRETRAIN, "stop.patience=2", "stop.patience needs train.evaluate_every"),
    (Pretrain, PRETRAIN, "run.track=[wandb]", "run.track.0 ('wandb') should be 'tensorboard'"),
    (LoraRun, CHATS, "run.output=runs", "run: output (runs) must not hold dir (runs/chat)"),
    (LoraRun, CHATS, "train.optimizer=muon", "train.optimizer must be adamw"),
]


@pytest.mark.parametrize(("kind", "content", "override", "told"), REFUSED, ids=[row[2] for row in REFUSED])
def test_wrong_values_are_told(tmp_path: Path, kind: type[Section], content: Any, override: str, told: str) -> None:
    with pytest.raises(TrainError) as error:
        read(tmp_path, kind, content, override)
    assert told in str(error.value)


def test_patience_needs_the_best_model_on_disk(tmp_path: Path) -> None:
    overrides = ("stop.patience=2", "train.evaluate_every=4", "train.checkpoint_every=6")
    with pytest.raises(
        TrainError, match=r"train.checkpoint_every \(6\) to be a multiple of train.evaluate_every \(4\)"
    ):
        read(tmp_path, Pretrain, PRETRAIN, *overrides)


EXAMPLES = [file for file in sorted((ROOT / "examples").rglob("*.yaml")) if file.parent.name != "ray"]
SECTIONS: dict[str, type[Section]] = {
    "tokenizer": TrainTokenizer, "prepare": Prepare, "pretrain": Pretrain, "sft": Sft, "lora": LoraRun,
}  # fmt: skip


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_the_examples_load(file: Path) -> None:
    """And the command at the top of each reads it."""
    name = file.stem if file.stem in SECTIONS else "lora"
    found: Any = read_yaml(file, SECTIONS[name])
    assert f"train {name} {file.relative_to(ROOT)}" in " ".join(file.read_text(encoding="utf-8").split("\n")[:2])
    if name in ("pretrain", "sft", "lora"):
        assert found.train.batch_tokens % (found.train.micro_batch * found.data.sequence) == 0
    if name == "pretrain":
        assert found.model.fields == {"sliding_window": 256, "sink_tokens": 4}


@pytest.mark.parametrize("story", ["poet", "storyteller"])
def test_a_storys_files_name_each_others_folders(story: str) -> None:
    read = {name: yaml.safe_load((ROOT / "examples" / story / f"{name}.yaml").read_text("utf-8")) for name in SECTIONS}
    assert read["prepare"]["tokenizer"] == read["tokenizer"]["output"]
    assert read["prepare"]["sources"] == read["tokenizer"]["sources"]
    assert read["pretrain"]["data"]["shards"] == read["prepare"]["output"]
    assert read["sft"]["model"]["path"] == read["pretrain"]["run"]["dir"] + "/model"
    assert read["lora"]["model"]["path"] == read["sft"]["run"]["dir"] + "/model"
