"""How runs end: at a signal for the whole group, at a second signal, and on a full disk."""

from pathlib import Path

import pytest

from tests.support.training.processes import run

pytest.importorskip("accelerate")


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run").iterdir() if "checkpoint" in path.name)


def test_ctrl_c_ends_quietly_with_loader_workers(tmp_path: Path) -> None:
    """The terminal sends it to the workers, too; they must load what the step still needs, and say nothing."""
    ended = run(tmp_path, signal_at=5, signal="SIGINT", to_group=True, workers=2)
    assert ended.statuses == [128 + 2], ended.output
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    for word in ("Traceback", "Error", "Interrupt", "killed"):
        assert word not in ended.output, ended.output


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    ended = run(tmp_path, signal_at=5, signals=2)
    assert ended.statuses == [128 + 15] and "stopped without saving" in ended.output, ended.output
    assert checkpoints(tmp_path) == []


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    ended = run(tmp_path, train={"checkpoint_every": 2}, full_disk_at=4)
    assert ended.statuses == [1] and "Traceback" not in ended.output, ended.output
    told = " ".join(ended.output.split())
    assert "checkpoint-4 could not be written (" in told and "checkpoint-2 is the last one." in told
    assert checkpoints(tmp_path) == ["checkpoint-2"]
