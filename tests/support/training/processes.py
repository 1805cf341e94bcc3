"""Training runs in processes of their own, alone or as the ranks of one run, and what they leave."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.support.training.rows import hash_of

MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "residual_dropout": 0.1,
    "attention_dropout": 0.1,
    "sliding_window": 12,
    "sink_tokens": 2,
}
TRAIN = {
    "batch_tokens": 192,  # 8 rows of 24 tokens: 4 batches of 2 rows on one rank; an epoch of 40 rows has 5 steps
    "micro_batch": 2,
    "epochs": 2.4,
    "lr": 0.003,
    "schedule": "cosine_with_restarts",
    "cycles": 2,
    "warmup": 2,
    "ema": 0.9,
}


class Ended:
    """How the processes of a run ended: exit statuses and what they wrote."""

    def __init__(self, statuses: list[int], output: str) -> None:
        self.statuses = statuses
        self.output = output


def run(folder: Path, *, ranks: int = 1, **changes: Any) -> Ended:
    """Run `tests.support.training.one_run` in `folder`; `changes` are those of its settings."""
    return run_all([{"folder": folder, **changes}], ranks=ranks)


def run_all(runs: Sequence[Mapping[str, Any]], *, ranks: int) -> Ended:
    """Several runs one after the other in the same processes, which must all end well."""
    told = []
    for changes in runs:
        changes["folder"].mkdir(parents=True, exist_ok=True)
        told.append({"model": MODEL, **changes, "train": TRAIN | changes.get("train", {})})
    file = runs[0]["folder"] / "told.json"
    file.write_text(json.dumps(told, default=str), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(ranks)}
        command = [sys.executable, "-m", "tests.support.training.one_run", str(file)]
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # a signal for its group reaches its loader workers, and nothing of ours
            )
        )
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    return Ended([process.returncode for process in processes], "\n".join(outputs))


def steps_of(folder: Path) -> dict[int, tuple[float, float, float]]:
    """Loss, gradient norm and learning rate of every step, from the newest checkpoint in the run's folder."""
    newest = max((folder / "run").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    history = json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {
        entry["step"]: (entry["loss"], entry["grad_norm"], entry["learning_rate"])
        for entry in history
        if "loss" in entry
    }


def final_hash(folder: Path) -> str:
    """Of the names and bits of the finished model's weights."""
    return hash_of(load_file(folder / "run" / "model" / "model.safetensors"))
