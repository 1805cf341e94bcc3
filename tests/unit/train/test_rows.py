"""Which rows a rank reads: those of a step are the same on any number of ranks; and where their positions begin."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from stellarbyte.train.config.run import Pretrain
from stellarbyte.train.data.packing import NO_LABEL
from stellarbyte.train.errors import TrainError
from stellarbyte.train.launch import train
from stellarbyte.train.rows import RankBatches, RankRows, ShiftedRows, ShuffledStream
from stellarbyte.train.trainer import ByteTrainer
from tests.support.training.processes import MODEL, TRAIN, final_hash
from tests.support.training.rows import random_rows, run_data

pytest.importorskip("accelerate")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_reads_the_same_rows_on_any_number_of_ranks(ranks: int) -> None:
    stream = ShuffledStream(num_rows=10, length=3 * 8, seed=1)
    shares = [list(RankBatches(stream, size=2, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert {len(share) for share in shares} == {12 // ranks} == {len(RankBatches(stream, size=2, rank=0, ranks=ranks))}
    order = list(stream)
    for step in range(3):
        batches = slice(step * 4 // ranks, (step + 1) * 4 // ranks)
        read = [row for share in shares for batch in share[batches] for row in batch]
        assert sorted(read) == sorted(order[8 * step : 8 * (step + 1)])


def test_ranks_have_equally_many_held_out_rows_of_which_each_counts_once() -> None:
    rows = random_rows(5, 24)
    shares = [[RankRows(rows, rank=rank, ranks=4)[i] for i in range(2)] for rank in range(4)]
    learned = [row["labels"].tolist() for share in shares for row in share if (row["labels"] != NO_LABEL).any()]
    assert sorted(learned) == sorted(rows[number]["labels"].tolist() for number in range(5))


def test_positions_of_a_row_begin_where_its_number_and_the_seed_say() -> None:
    rows = random_rows(200, 24)
    shifted = ShiftedRows(rows, largest=7, seed=3)
    shifts = []
    for number in range(200):
        row, plain = shifted[number], rows[number]
        moved = row["position_ids"] - plain["position_ids"]
        assert (moved == moved[0]).all()
        shifts.append(int(moved[0]))
        assert all(torch.equal(row[name], plain[name]) for name in ("input_ids", "labels", "document_ids"))
    assert set(shifts) == set(range(8))
    assert shifts == [int(shifted[number]["position_ids"][0]) for number in range(200)]
    other = ShiftedRows(rows, largest=7, seed=4)
    assert shifts != [int(other[number]["position_ids"][0]) for number in range(200)]


def run_with_shift(folder: Path, shift: int) -> None:
    config = Pretrain.model_validate(
        {
            "run": {"dir": str(folder / "run"), "plots": False},
            "model": MODEL | {"max_position_embeddings": 64},
            "data": {"shards": str(folder), "sequence": 24, "position_shift": shift},
            "train": TRAIN | {"ema": None, "epochs": 0.8},
        }
    )
    train("pretrain", config, run_data(folder), resume=False, console=Console(file=io.StringIO()))


def test_a_run_with_shifted_positions_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotations are relative, so that the shift costs nothing; beyond the context it is refused."""
    step, starts = ByteTrainer.training_step, []

    def observed(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        starts.extend(inputs["position_ids"][:, 0].tolist())
        loss: torch.Tensor = step(self, model, inputs, num_items_in_batch)
        return loss

    monkeypatch.setattr(ByteTrainer, "training_step", observed)
    for shift in (0, 40):
        starts.clear()
        run_with_shift(tmp_path / str(shift), shift)
        assert len(starts) == 32 and (len(set(starts)) > 10) == (shift > 0) and max(starts) <= shift
    assert final_hash(tmp_path / "40") == final_hash(tmp_path / "0")
    with pytest.raises(TrainError, match=r"data.sequence \(24\) and data.position_shift \(41\) are beyond the model's"):
        run_with_shift(tmp_path / "beyond", 41)
