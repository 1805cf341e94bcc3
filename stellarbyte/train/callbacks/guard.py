"""Ends a run at a signal: the step is finished and saved, on every rank."""

import os
import signal
import sys
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from stellarbyte.train.ranks import any_rank

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, a supervisor, and what Slurm sends before the end


class Guard(TrainerCallback):
    """Attributes: stopped: whether the run was ended before its last step. number: of the first signal here, or None.

    A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Put back the handlers of before the run."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if any_rank(self.number is not None, args.device) and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.number is not None:
            os.write(sys.stderr.fileno(), b"stopped without saving\n")
            os._exit(128 + number)
        self.number = number


def leave_signals_to_the_parent(_worker: int) -> None:
    """For processes that load data: a signal for the whole group must not end them before the step is finished."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
