"""The progress of a run as messages for another program: losses, checkpoints, and the adapter after each epoch."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from transformers import TrainerCallback

from stellarbyte.checkpoint.staging import staged_folder
from stellarbyte.lora import save_adapter


class Messages:
    """Writes messages as JSON lines."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def send(self, kind: str, **content: Any) -> None:
        self._file.write(json.dumps({"type": kind, **content}).encode() + b"\n")
        self._file.flush()


class Progress(TrainerCallback):
    """Reports each step of a run. One that continues reports the steps before it again, as some may be unknown.

    Args:
        tokens: read up to the end of each step, in order; steps_of_epochs: the last step of each epoch.
    """

    def __init__(
        self, messages: Messages, folder: Path, tokens: Sequence[int], steps_of_epochs: Sequence[int], keep: int
    ) -> None:
        self._messages = messages
        self._folder = folder
        self._tokens = tokens
        self._epochs = set(steps_of_epochs[:-1][-keep:])  # the last one is the result
        self._has_begun = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._has_begun = True
        for entry in state.log_history:
            self._send(entry["step"], entry)
        for step in sorted(self._epochs):
            if step <= state.global_step and self._adapter(step).exists():
                self._messages.send("epoch", step=step)
        self._messages.send("begun", step=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs is not None:
            self._send(state.global_step if self._has_begun else 0, logs)

    def _send(self, step: int, logs: dict[str, Any]) -> None:
        if "loss" in logs:
            rate, tokens = logs["learning_rate"], self._tokens[step - 1]
            self._messages.send("step", step=step, train_loss=logs["loss"], learning_rate=rate, tokens=tokens)
        if "eval_loss" in logs:
            self._messages.send("evaluation", step=step, valid_loss=logs["eval_loss"])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._messages.send("saved", step=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        if state.global_step in self._epochs:
            target = self._adapter(state.global_step)
            if target.exists():  # of a run that was continued from before it
                shutil.rmtree(target)
            with staged_folder(target) as staging:
                save_adapter(model, staging)
            self._messages.send("epoch", step=state.global_step)

    def _adapter(self, step: int) -> Path:
        return self._folder / f"step-{step}"
