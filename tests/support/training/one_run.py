"""Training runs in a process of their own, from a JSON file of their settings; signals arrive at a chosen batch.

    python -m tests.support.training.one_run FILE

FILE: a list of runs, one after the other: {"folder": ..., "train": {...}, "model": {...}, "workers": 0, "rows": 40,
"held_out": 0, "resume": false, "signal_at": null or a batch of this rank, counted from 0, "signal_rank": 0,
"signal": "SIGTERM", "signals": 1, "to_group": false, "kill_while_saving": null or a step,
"full_disk_at": null or a step, "parallel": {}, "kind": "pretrain", "data": {}, "warnings": {} or texts by rank}
"""

import json
import logging
import os
import resource
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from stellarbyte.train import trainer as trainer_module
from stellarbyte.train.config.run import LoraRun, Pretrain
from stellarbyte.train.errors import TrainError
from stellarbyte.train.launch import train
from stellarbyte.train.ranks import leave_group
from tests.support.training.rows import run_data

torch.set_num_threads(1)


def main() -> int:
    statuses = [_run(told) for told in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))]
    leave_group()
    return next((status for status in statuses if status), 0)


def _run(told: dict[str, Any]) -> int:
    folder = Path(told["folder"])
    sections = {
        "run": {"dir": str(folder / "run"), "seed": 3, "plots": False},
        "model": told["model"],
        "data": {"sequence": 24, "workers": told.get("workers", 0), **told.get("data", {})},
        "train": told["train"],
        "stop": told.get("stop", {}),
        "parallel": told.get("parallel", {}),
    }
    is_lora = told.get("kind") == "lora"
    sections["data"] |= {"chats": [str(folder)]} if is_lora else {"shards": str(folder)}
    config = (LoraRun if is_lora else Pretrain).model_validate(sections)
    changes = {"fingerprint": told["fingerprint"]} if "fingerprint" in told else {}
    data = run_data(folder, num_rows=told.get("rows", 40), held_out=told.get("held_out", 0), **changes)
    _inject(told)
    try:
        outcome = train(
            told.get("kind", "pretrain"), config, data, resume=told.get("resume", False), console=Console(stderr=True)
        )
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0 if outcome.folder is not None else 128 + (outcome.number or 0)


def _inject(told: dict[str, Any]) -> None:
    """Make the trainer send this process a signal, or lose its disk, at a place that a test has chosen."""
    batches = 0
    step = trainer_module.ByteTrainer.training_step
    rank = int(os.environ.get("RANK", "0"))

    def training_step(self: Any, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        nonlocal batches
        for text in told.get("warnings", {}).get(str(rank), []):
            warnings.warn(text, stacklevel=1)
            logging.getLogger("some.library").warning("logged: %s", text)
            logging.getLogger("some.library").info("information: %s", text)
        if batches == told.get("signal_at") and rank == told.get("signal_rank", 0):
            number = getattr(signal, told.get("signal", "SIGTERM"))
            for _ in range(told.get("signals", 1)):
                (os.killpg if told.get("to_group") else os.kill)(os.getpid(), number)
        batches += 1
        return step(self, model, inputs, num_items_in_batch)

    trainer_module.ByteTrainer.training_step = training_step  # type: ignore[method-assign]
    save_model = trainer_module.ByteTrainer.save_model

    def without_space(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.state.global_step == told.get("full_disk_at"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))  # as on a full disk: writes fail
        save_model(self, output_dir, _internal_call)

    trainer_module.ByteTrainer.save_model = without_space  # type: ignore[method-assign]
    if told.get("kill_while_saving") is not None:
        save = trainer_module.ByteTrainer._save_rng_state

        def killed(self: Any, output_dir: str) -> None:
            if self.state.global_step == told["kill_while_saving"]:
                os.kill(os.getpid(), signal.SIGKILL)
            save(self, output_dir)

        trainer_module.ByteTrainer._save_rng_state = killed


if __name__ == "__main__":
    sys.exit(main())
