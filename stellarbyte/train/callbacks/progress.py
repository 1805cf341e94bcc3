"""Shows a run on the terminal of its first rank: a bar, and a table after each evaluation."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

LINES_OF_A_RUN = 20  # where the output is no terminal

_LABELS = {
    "eval_loss": "loss",
    "eval_perplexity": "perplexity",
    "eval_bits_per_byte": "bits per byte",
    "eval_tokens": "tokens",
}


class ProgressBar(TrainerCallback):
    """The steps of a run, with its loss and its speed; nothing on other ranks than the first.

    Args:
        batch_tokens: of one step.
        flops_per_token, peak_flops: of all ranks, for the share of the devices' speed that is used; None: not shown.
    """

    def __init__(
        self, console: Console, *, batch_tokens: int, flops_per_token: float, peak_flops: float | None
    ) -> None:
        self.console = console
        self.batch_tokens = batch_tokens
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.tokens_per_second: float | None = None
        self._evaluations: list[dict[str, float]] = []
        self._since: tuple[float, int] | None = None
        self._progress: Progress | None = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._since = time.perf_counter(), state.global_step
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=self.console)
            self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step)
            self._progress.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self._since is None or logs is None or "loss" not in logs:
            return
        start, first = self._since
        elapsed = time.perf_counter() - start
        if elapsed > 0 and state.global_step > first:
            self.tokens_per_second = (state.global_step - first) * self.batch_tokens / elapsed
        text = f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}{self._speed()}"
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step, description=text)
        elif state.global_step % max(1, state.max_steps // LINES_OF_A_RUN) == 0:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {text}")

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        if self._since is None or metrics is None:
            return
        self._evaluations.append({"step": state.global_step, **metrics})
        self.console.print(evaluation_table(self._evaluations))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was; may be called twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _speed(self) -> str:
        if self.tokens_per_second is None:
            return ""
        text = f"  {self.tokens_per_second:,.0f} tokens/s"
        if self.peak_flops is not None:
            text += f"  MFU {self.tokens_per_second * self.flops_per_token / self.peak_flops:.1%}"
        return text


def evaluation_table(evaluations: list[dict[str, float]], rows: int = 5) -> Table:
    """The last evaluations, one a row; a smaller loss than all before is marked."""
    names = [name for name in _LABELS if name in evaluations[-1]]
    table = Table("step", *(_LABELS[name] for name in names), "")
    losses = [evaluation["eval_loss"] for evaluation in evaluations]
    for number, evaluation in list(enumerate(evaluations))[-rows:]:
        is_best = losses[number] <= min(losses[: number + 1])
        cells = [f"{evaluation[name]:,.0f}" if name == "eval_tokens" else f"{evaluation[name]:.4f}" for name in names]
        table.add_row(str(int(evaluation["step"])), *cells, "best" if is_best else "")
    return table
