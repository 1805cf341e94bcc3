"""A run that was stopped and continued computes the numbers of one that never stopped, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from stellarbyte.train import checkpoints
from stellarbyte.train.parallel.layout import Layout
from tests.support.cases import some
from tests.support.training.processes import final_hash, run, run_all, steps_of
from tests.support.training.rows import hash_of

pytest.importorskip("accelerate")

SAVED_AT_THE_END = {"checkpoint_every": 12, "evaluate_every": 4}
HELD_OUT = 5


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    ended = run(folder, train=SAVED_AT_THE_END, held_out=HELD_OUT)
    assert ended.statuses == [0], ended.output
    assert sorted(steps_of(folder)) == list(range(1, 13))
    return folder


def assert_equal_runs(found: Path, expected: Path) -> None:
    assert steps_of(found) == steps_of(expected)
    assert final_hash(found) == final_hash(expected)
    optimizers = [(folder / "run" / "checkpoint-12" / "ema.safetensors") for folder in (found, expected)]
    assert hash_of(load_file(optimizers[0])) == hash_of(load_file(optimizers[1]))


@pytest.mark.parametrize(("signal_at", "step"), some([(9, 3), (4 * 7 - 1, 7)], 0))
def test_stopped_in_an_accumulation_and_continued_with_loader_workers(
    uninterrupted: Path, tmp_path: Path, signal_at: int, step: int
) -> None:
    """In the middle of an accumulation and of an epoch, and at the last batch of a step of the second epoch."""
    ended = run(tmp_path, train=SAVED_AT_THE_END, held_out=HELD_OUT, signal_at=signal_at)
    assert ended.statuses == [128 + 15], ended.output
    assert "Traceback" not in ended.output
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    ended = run(tmp_path, train=SAVED_AT_THE_END, held_out=HELD_OUT, resume=True, workers=2)
    assert ended.statuses == [0] and f"Continuing after checkpoint-{step}" in ended.output, ended.output
    assert_equal_runs(tmp_path, uninterrupted)


def test_killed_while_saving(uninterrupted: Path, tmp_path: Path) -> None:
    """The checkpoint before is continued, and what was half written is gone."""
    every = {"checkpoint_every": 4, "evaluate_every": 4, "keep": 9}
    ended = run(tmp_path, train=every, held_out=HELD_OUT, kill_while_saving=8)
    assert ended.statuses == [-9]
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name) == [
        ".checkpoint-8.partial",
        "checkpoint-4",
    ]
    ended = run(tmp_path, train=every, held_out=HELD_OUT, resume=True)
    assert ended.statuses == [0], ended.output
    assert_equal_runs(tmp_path, uninterrupted)
    names = sorted(path.name for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name)
    assert names == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]


def stop_one_of_two_ranks(folder: Path) -> None:
    ended = run(folder, ranks=2, train=SAVED_AT_THE_END, held_out=HELD_OUT, signal_at=4, signal_rank=1)
    assert ended.statuses == [128 + 15] * 2, ended.output
    assert len(list((folder / "run").glob("checkpoint-*"))) == 1


@pytest.mark.slow
def test_a_signal_to_one_of_two_ranks_stops_both(tmp_path: Path) -> None:
    stop_one_of_two_ranks(tmp_path)


@pytest.mark.slow
def test_two_ranks_that_were_stopped_go_on(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    ended = run(whole, ranks=2, train=SAVED_AT_THE_END, held_out=HELD_OUT)
    assert ended.statuses == [0, 0], ended.output
    stop_one_of_two_ranks(stopped)
    ended = run(stopped, ranks=2, train=SAVED_AT_THE_END, held_out=HELD_OUT, resume=True)
    assert ended.statuses == [0, 0], ended.output
    assert_equal_runs(stopped, whole)


def test_a_rank_that_comes_before_the_folder_waits_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "run" / "checkpoint-3"
    monkeypatch.setattr(checkpoints, "wait_for_all", lambda: made.mkdir(parents=True))  # the first rank makes it
    found = checkpoints.Checkpoints(made.parent, {"data": "hash"}, Layout(replicas=2, fsdp=1, tensor=1)).last()
    assert found == made


def test_other_data_and_other_batches_are_refused(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run" / "model")
    refused = {
        "checkpoint-12 was made from other data (sha ffffffffffff; the file names sha aaaa": {
            "resume": True,
            "fingerprint": "a" * 64,
        },
        "checkpoint-12 was made with batch_tokens 192; the file says 96": {
            "resume": True,
            "train": {"batch_tokens": 96},
        },
        "has checkpoint-12; continue with --resume": {},
    }
    ended = run_all([{"folder": tmp_path, **changes} for changes in refused.values()], ranks=1)
    assert ended.statuses == [1] and ended.output.count("error: ") == len(refused), ended.output
    for told in refused:
        assert told in ended.output.replace("\n", " "), ended.output


def test_the_history_of_a_run_has_epochs_of_the_data(uninterrupted: Path) -> None:
    state = json.loads((uninterrupted / "run" / "checkpoint-12" / "trainer_state.json").read_text())
    epochs = {entry["step"]: entry["epoch"] for entry in state["log_history"] if "loss" in entry}
    assert epochs[5] == 1.0 and epochs[12] == 2.4
