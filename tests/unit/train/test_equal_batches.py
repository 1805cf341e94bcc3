"""One batch, however it is divided: the same losses, gradients and weights."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from stellarbyte.train.config.run import Pretrain
from stellarbyte.train.launch import train
from tests.support.training.processes import MODEL, TRAIN, run, steps_of
from tests.support.training.rows import run_data

pytest.importorskip("accelerate")
EXACT = MODEL | {"residual_dropout": 0.0, "attention_dropout": 0.0}
SMOOTH = {"label_smoothing": 0.1, "ema": None, "epochs": 1.2, "checkpoint_every": 6}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "model" / "model.safetensors")


def test_batches_divided_over_forwards_and_ranks_are_one(tmp_path: Path) -> None:
    """8 rows of uneven documents: at once, in two, in four, and in two on each of two ranks."""
    for divided, changes in {8: {}, 4: {"recompute_every": 2}, 2: {}}.items():
        folder = tmp_path / str(divided)
        config = Pretrain.model_validate(
            {
                "run": {"dir": str(folder / "run"), "seed": 3, "plots": False},
                "model": EXACT,
                "data": {"shards": str(folder), "sequence": 24},
                "train": TRAIN | SMOOTH | changes | {"micro_batch": divided},
            }
        )
        train("pretrain", config, run_data(folder), resume=False, console=Console(file=io.StringIO()))
    ended = run(tmp_path / "ranks", ranks=2, model=EXACT, train=SMOOTH)
    assert ended.statuses == [0, 0], ended.output
    assert ended.output.count("step 6/6") == 1, ended.output  # the first rank alone shows the run
    expected_steps, expected = steps_of(tmp_path / "8"), weights(tmp_path / "8")
    for name in ("4", "2", "ranks"):
        for step, numbers in steps_of(tmp_path / name).items():
            assert numbers == pytest.approx(expected_steps[step], rel=1e-4), (name, step)
        for key, weight in weights(tmp_path / name).items():
            torch.testing.assert_close(weight, expected[key], atol=1e-4, rtol=1e-3)
