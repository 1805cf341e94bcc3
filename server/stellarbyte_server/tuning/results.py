"""The result of a job: the name of its model, and the losses of its steps as a file."""

import csv
import hashlib
import io
import re
from pathlib import Path

from stellarbyte_server.config.settings import TUNED_PREFIX
from stellarbyte_server.tuning.jobs import Event, Job, Publication

MAX_SUFFIX = 64  # characters
ADAPTER_FILES = "adapter_config.json", "adapter_model.safetensors"
_HASH_DIGITS = 8
_MAX_NAME = 128  # of an adapter
_OF_CHECKPOINT = len(":ckpt-step-") + 6
_COLUMNS = ("step", "train_loss", "valid_loss", "learning_rate", "tokens")


def model_name(base: str, suffix: str | None, job_id: str, adapter: Path) -> str:
    """ft:BASE:SUFFIX:HASH, with the hash of the job and of the adapter's files. OSError."""
    digest = hashlib.sha256(job_id.encode())
    for name in ADAPTER_FILES:
        digest.update((adapter / name).read_bytes())
    end = f":{'' if suffix is None else suffix}:{digest.hexdigest()[:_HASH_DIGITS]}"
    room = _MAX_NAME - _OF_CHECKPOINT - len(TUNED_PREFIX) - len(end)
    return TUNED_PREFIX + re.sub(r"[^A-Za-z0-9._/-]", "-", base)[:room] + end


def checkpoint_name(model: str, step: int) -> str:
    return f"{model}:ckpt-step-{step}"


def model_of_checkpoint(name: str) -> str:
    """The model of a checkpoint's name; other names stay."""
    return re.sub(r":ckpt-step-\d+$", "", name)


def metrics_event(step: int, steps: int, **metrics: float) -> Event:
    shown = ", ".join(f"{name.replace('_', ' ')}={value:.4f}" for name, value in metrics.items() if "loss" in name)
    return Event(message=f"Step {step}/{steps}: {shown}", data={"step": step, "total_steps": steps, **metrics})


def comparison_event(figures: dict[str, float]) -> Event:
    """Of the figures at the end of a training: eval_…, base_… and previous_…"""
    shown = ", ".join(f"{name.removeprefix('eval_').replace('_', ' ')}={value:.4f}" for name, value in figures.items())
    return Event(message=f"Compared on the validation file: {shown}")


def published(live: Publication) -> Event:
    share = "" if live.share is None else f", with a share of {live.share:g}"
    return Event(message=f"Live as {live.name}, version {live.version}{share}")


def not_published(name: str, reason: Exception) -> Event:
    return Event(message=f"Not live as {name}: {reason}", level="warn")


def metrics_csv(job: Job, events: list[Event]) -> bytes:
    """The losses of every step, one a line; step 0 is the model before the training."""
    rows: dict[int, dict[str, float]] = {}
    for event in events:
        if event.data is not None:
            rows.setdefault(int(event.data["step"]), {}).update(event.data)
    file = io.StringIO()
    writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[step] for step in sorted(rows) if step <= (job.steps or 0))
    return file.getvalue().encode()
