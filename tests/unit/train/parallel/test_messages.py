"""What two ranks put on one screen."""

from pathlib import Path

import pytest

from tests.support.training.processes import run

pytest.importorskip("accelerate")


def test_a_warning_appears_once_with_its_rank_and_everything_else_by_the_first_rank(tmp_path: Path) -> None:
    texts = {"0": ["of both ranks"], "1": ["of both ranks", "of the second alone"]}
    ended = run(tmp_path, ranks=2, train={"epochs": 1.2, "checkpoint_every": 3}, warnings=texts, held_out=5)
    assert ended.statuses == [0, 0], ended.output
    shown = [" ".join(line.split()) for line in ended.output.splitlines()]
    assert [line for line in shown if "second alone" in line] == [
        "rank 1: UserWarning: of the second alone",
        "rank 1: warning: logged: of the second alone",
    ]
    for text in ("UserWarning: of both ranks", "warning: logged: of both ranks"):
        assert sum(line in (f"rank 0: {text}", f"rank 1: {text}") for line in shown) == 1, ended.output
    assert "information" not in ended.output
    assert sum("step 6/6" in line for line in shown) == 1
    assert sum("perplexity" in line for line in shown) == 1
