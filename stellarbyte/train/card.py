"""The model card: README.md beside the weights, and training.json, which `stellarbyte info` shows."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from stellarbyte.checkpoint.info import TrainingRecord, record_lines

_KINDS = {
    "pretrain": "A language model trained from the start on token shards",
    "sft": "A language model trained on chats",
    "lora": "A LoRA adapter in PEFT's format, trained on chats",
}


def versions() -> dict[str, str]:
    """Of the programs that decide a run's numbers."""
    return {name: version(name) for name in ("stellarbyte", "torch", "transformers", "accelerate")}


def write_card(record: TrainingRecord, folder: Path, *, name: str) -> None:
    """Write README.md and training.json into the folder. Raises OSError."""
    head: dict[str, Any] = {"library_name": "stellarbyte", "tags": ["bytetransformer", record.kind]}
    if len(record.licenses) == 1:
        head["license"] = record.licenses[0]
    if record.base is not None:
        head["base_model"] = record.base
    command = "stellarbyte serve --model FOLDER"
    if record.kind == "lora":
        command = f"stellarbyte serve --model {record.base} --lora-modules NAME=FOLDER"
    rows = [f"| {label} | {text} |" for label, text in record_lines(record)]
    held_out = [f"| {name.removeprefix('eval_')} | {value:.6g} |" for name, value in sorted(record.held_out.items())]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=True, allow_unicode=True)}---\n",
        f"# {name}\n",
        f"{_KINDS[record.kind]}. `{command}` serves it.\n",
        "## Training\n",
        "\n".join(["| | |", "|---|---|", *rows]) + "\n",
        f"Data SHA-256: `{record.data_sha256}`\n",
        *([] if record.base_sha256 is None else [f"Base weights SHA-256: `{record.base_sha256}`\n"]),
    ]
    if held_out:
        parts += ["## Held-out text\n", "\n".join(["| metric | value |", "|---|---|", *held_out]) + "\n"]
    parts += ["## Settings\n", f"```yaml\n{yaml.safe_dump(record.settings, allow_unicode=True)}```\n"]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")
    record.write(folder)
