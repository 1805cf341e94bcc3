"""Runs of ranks that divide the model, stopped, killed and continued: bit for bit on these ranks, equal on others."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.cases import some
from tests.support.training.processes import MODEL, final_hash, run, run_all, steps_of

pytest.importorskip("accelerate")
EVERY = {"checkpoint_every": 4, "keep": 9}
DIVISIBLE = MODEL | {"residual_dropout": 0.0, "attention_dropout": 0.0, "num_key_value_heads": 2}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run").iterdir() if "checkpoint" in path.name)


@pytest.mark.parametrize("is_killed", some([False, True], 0))
def test_stopped_and_killed_while_saving_on_the_same_ranks(tmp_path: Path, is_killed: bool) -> None:
    """With dropout. The signal reaches the second rank; the kill leaves a part of a checkpoint."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    told = {"model": MODEL, "parallel": {"fsdp": 2}, "train": EVERY}
    signalled = {"folder": stopped, "signal_at": 5, "signal_rank": 1, **told}
    ended = run_all([{"folder": whole, **told}, signalled], ranks=2)
    assert ended.statuses == [128 + 15] * 2, ended.output
    assert checkpoints(stopped) == ["checkpoint-3"] and sorted(steps_of(whole)) == list(range(1, 13))
    if is_killed:
        ended = run(stopped, ranks=2, resume=True, kill_while_saving=8, **told)
        assert ended.statuses == [-9, -9]
        assert checkpoints(stopped) == [".checkpoint-8.partial", "checkpoint-3", "checkpoint-4"]
    ended = run(stopped, ranks=2, resume=True, **told)
    assert ended.statuses == [0, 0], ended.output
    assert ended.output.count(f"Continuing after checkpoint-{4 if is_killed else 3}.") == 1, ended.output
    assert steps_of(stopped) == steps_of(whole)
    assert final_hash(stopped) == final_hash(whole)


@pytest.mark.slow
def test_each_checkpoint_is_continued_by_other_ranks(tmp_path: Path) -> None:
    """Three steps each: two ranks with the whole model, four that divide both, two that divide parameters, one."""
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    settings = {"train": {"checkpoint_every": 12}, "model": DIVISIBLE}
    assert run(whole, **settings).statuses == [0]
    layouts = [(2, {}), (4, {"fsdp": 2, "tensor": 2}), (2, {"fsdp": 2}), (1, {})]
    for number, (ranks, parallel) in enumerate(layouts):
        batches_of_a_step = 4 // (ranks // parallel.get("tensor", 1))
        stop = {"signal_at": 3 * batches_of_a_step - 1} if ranks > 1 else {}
        ended = run(begun, ranks=ranks, parallel=parallel, resume=number > 0, **stop, **settings)
        assert set(ended.statuses) == {128 + 15 if stop else 0}, ended.output
        shown = " ".join(ended.output.split())
        assert shown.count("Continuing after") == (number > 0), ended.output
    assert (
        "Continuing after checkpoint-9, which 2 ranks (fsdp 2, tensor 1) made, on 1 rank: with the same rows" in shown
    )
    expected_steps = steps_of(whole)
    for step, numbers in steps_of(begun).items():
        assert numbers == pytest.approx(expected_steps[step], rel=2e-5), step
    found, expected = (load_file(folder / "run" / "model" / "model.safetensors") for folder in (begun, whole))
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], atol=2e-5, rtol=1e-4)
