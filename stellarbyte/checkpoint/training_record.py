"""training.json beside a model's weights: from which data it was made, and how."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.safetensors_file import read_json

RECORD_FILE = "training.json"


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """Attributes: data_sha256: fingerprint of the data; tokens: read in all steps; base: the model that was trained
    further, or None; loss: of the last step; held_out: metrics of the last evaluation; versions: of the programs."""

    kind: str  # pretrain, sft or lora
    base: str | None
    data_sha256: str
    licenses: tuple[str, ...]
    tokens: int
    steps: int
    epochs: float
    loss: float
    held_out: dict[str, float]
    settings: dict[str, Any]
    versions: dict[str, str]

    def write(self, folder: Path) -> None:
        """Raises OSError."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        (folder / RECORD_FILE).write_text(text + "\n", encoding="utf-8")


def read_record(folder: Path) -> TrainingRecord | None:
    """The record in a checkpoint's folder; None: it was not trained here.

    Raises:
        CheckpointError: it is not one.
    """
    if not (folder / RECORD_FILE).is_file():
        return None
    content = read_json(folder / RECORD_FILE)
    names = {field.name for field in dataclasses.fields(TrainingRecord)}
    if content.keys() != names or not isinstance(content["licenses"], list):
        raise CheckpointError(f"{folder / RECORD_FILE} was not written by stellarbyte train.")
    return TrainingRecord(**content | {"licenses": tuple(content["licenses"])})


def record_lines(record: TrainingRecord) -> list[tuple[str, str]]:
    """The record as (label, text) for people."""
    trained = f"{record.kind}, {record.steps:,} steps, {record.tokens:,} tokens, {record.epochs:.3g} epochs"
    losses = f"{record.loss:.4f} in training"
    if "eval_loss" in record.held_out:
        losses += f", {record.held_out['eval_loss']:.4f} held out"
    return [
        ("trained", trained if record.base is None else f"{trained}, from {record.base}"),
        ("loss", losses),
        ("data", f"sha {record.data_sha256[:12]}, licences: {', '.join(record.licenses) or 'unknown'}"),
        ("made with", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
    ]
