"""Which ranks hold what, and the sentences for what cannot be divided."""

from pathlib import Path
from typing import Any

import pytest

from stellarbyte.train.config.run import LoraRun, Parallel, Pretrain
from stellarbyte.train.errors import TrainError
from stellarbyte.train.launch import train
from stellarbyte.train.parallel.layout import Layout, layout_of, refuse_undivided
from tests.support.models.byte_transformer import make_model
from tests.support.training.processes import MODEL, TRAIN
from tests.support.training.rows import run_data

pytest.importorskip("accelerate")


def test_ranks_are_divided_into_copies_parts_and_groups() -> None:
    layout = layout_of(Parallel(fsdp=2, tensor=2), 8)
    assert layout == Layout(replicas=2, fsdp=2, tensor=2) and layout.ranks == 8
    assert [layout.data_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [layout.is_first_of_group(rank) for rank in range(4)] == [True, False, True, False]
    assert str(layout) == "8 ranks (fsdp 2, tensor 2)" and str(layout_of(Parallel(), 3)) == "3 ranks"
    with pytest.raises(
        TrainError, match=r"parallel.fsdp \(4\) × parallel.tensor \(2\) needs a multiple of 8 ranks, but 4"
    ):
        layout_of(Parallel(fsdp=4, tensor=2), 4)


@pytest.mark.parametrize(
    ("changes", "tensor", "told"),
    [
        ({"num_attention_heads": 8}, 3, r"3 does not divide model.num_attention_heads \(8\)"),
        ({"num_attention_heads": 8, "num_key_value_heads": 2}, 4, r"4 does not divide model.num_key_value_heads \(2\)"),
        ({"intermediate_size": 49}, 2, r"2 does not divide model.intermediate_size \(49\)"),
        (
            {"num_experts": 4, "shared_expert_intermediate_size": 15},
            2,
            r"2 does not divide model.shared_expert_intermediate_size \(15\)",
        ),
        (
            {"qk_norm": True, "qk_norm_per_head": False},
            2,
            r"parallel.tensor \(2\) cannot be used with model.qk_norm_per",
        ),
        ({"xpos_learnable_scale": True}, 2, r"cannot be used with model.xpos_learnable_scale"),
        ({"attention_dropout": 0.1}, 2, r"cannot be used with model.attention_dropout"),
    ],
)
def test_models_that_cannot_be_divided_are_refused(changes: dict[str, Any], tensor: int, told: str) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4}
    config = make_model(**(sizes | changes)).config
    refuse_undivided(config, 1)
    with pytest.raises(TrainError, match=told):
        refuse_undivided(config, tensor)


def test_the_model_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a run's own check: neither weights are read nor ranks wait for each other."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    make_model().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"")
    config = settings(tmp_path, model={"path": str(tmp_path / "base")}, parallel={"tensor": 3})
    with pytest.raises(TrainError, match=r"3 does not divide model.num_attention_heads"):
        train("pretrain", config, run_data(tmp_path), resume=False, console=None)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["fsdp", "tensor"])
def test_settings_that_exclude_each_other(name: str, tmp_path: Path) -> None:
    parallel = {name: 2}
    with pytest.raises(ValueError, match=rf"train.optimizer muon cannot be used with parallel.{name} \(2\)"):
        settings(tmp_path, train={"optimizer": "muon"}, parallel=parallel)
    with pytest.raises(ValueError, match=rf"train.compile must be false with parallel.{name} \(2\)"):
        settings(tmp_path, train={"compile": True}, parallel=parallel)
    if name == "tensor":
        with pytest.raises(ValueError, match=r"parallel.tensor \(2\) must be 1 for an adapter"):
            LoraRun.model_validate(
                {
                    "run": {"dir": str(tmp_path)},
                    "model": {"path": "base"},
                    "data": {"chats": ["chats.jsonl"], "sequence": 24},
                    "train": TRAIN,
                    "parallel": parallel,
                }
            )


def settings(folder: Path, *, train: dict[str, Any] | None = None, **sections: Any) -> Pretrain:
    told = {
        "run": {"dir": str(folder / "run"), "plots": False},
        "model": MODEL,
        "data": {"shards": str(folder), "sequence": 24},
        "train": TRAIN | (train or {}),
    }
    return Pretrain.model_validate(told | sections)
