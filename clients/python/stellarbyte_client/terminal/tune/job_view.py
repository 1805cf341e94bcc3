"""Shows a job until it ends: its state and a curve of its losses in a terminal, or its events as lines in a pipe."""

import time
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stellarbyte_client.errors import ConnectionFailed
from stellarbyte_client.terminal.connection import CommandFailed
from stellarbyte_client.terminal.markdown import printable
from stellarbyte_client.terminal.tune.loss_plot import TRAIN, VALID, Point, loss_plot
from stellarbyte_client.terminal.tune.tuning_server import Job, JobEvent, TuningServer

LOOK_S = 0.5  # between two looks at the job
LOST_LIMIT_S = 60.0  # without an answer; a server that is restarted continues the job
_PLOT_ROWS, _PLOT_COLUMNS = 8, 72


@dataclass
class Progress:
    """What the events of a job say so far."""

    step: int = 0
    total_steps: int | None = None
    train: list[Point] = field(default_factory=list)
    valid: list[Point] = field(default_factory=list)
    last_event: str | None = None

    def add(self, event: JobEvent) -> None:
        self.last_event = event.id
        data = event.data or {}
        if "step" in data:
            self.step = int(data["step"])
            self.total_steps = int(data["total_steps"]) if "total_steps" in data else self.total_steps
        for name, points in (("train_loss", self.train), ("valid_loss", self.valid)):
            if name in data:
                points.append((data["step"], data[name]))


class JobView:
    """Follows one job. KeyboardInterrupt leaves it running."""

    def __init__(self, console: Console, server: TuningServer, job: Job) -> None:
        self._console = console
        self._server = server
        self._job = job
        self._progress = Progress()
        self._is_lost = False

    def follow(self) -> Job:
        """The job, once it has ended; StellarByteError, also if the server does not answer for long."""
        live = Live(self._drawn(), console=self._console, auto_refresh=False) if self._console.is_terminal else None
        if live is None:
            return self._look_until_over(None)
        with live:
            return self._look_until_over(live)

    def _look_until_over(self, live: Live | None) -> Job:
        answered_s = time.monotonic()
        while True:
            try:
                self._look(live)
                answered_s, self._is_lost = time.monotonic(), False
            except ConnectionFailed as error:
                self._is_lost = True
                if time.monotonic() - answered_s > LOST_LIMIT_S:
                    raise CommandFailed(
                        f"{error} Jobs continue when their server starts again: stellarbyte tune --resume"
                        f" {self._job.id}"
                    ) from None
            if live is not None:
                live.update(self._drawn(), refresh=True)
            if self._job.is_over and not self._is_lost:
                return self._job
            time.sleep(LOOK_S)

    def _look(self, live: Live | None) -> None:
        job = self._server.job(self._job.id)  # before the events: the last ones are shown, too
        for event in self._server.events_since(job.id, self._progress.last_event):
            self._progress.add(event)
            if live is None:
                self._console.print(printable(event.message))
            elif event.level != "info":
                live.console.print(Text(printable(event.message), style="yellow"))
        self._job = job

    def _drawn(self) -> Group:
        job, progress = self._job, self._progress
        drawn: list[RenderableType] = [Text.assemble((job.id, "bold"), "  ", self._state())]
        if progress.total_steps:
            bar = Table.grid(padding=(0, 1))
            bar.add_row(
                ProgressBar(progress.total_steps, progress.step, width=40),
                Text(f"step {progress.step} of {progress.total_steps}{self._left()}"),
            )
            drawn.append(bar)
        width = min(_PLOT_COLUMNS, self._console.width - 1)
        plot = loss_plot(progress.train, progress.valid, width, _PLOT_ROWS)
        drawn += [Text(line) for line in plot]
        if plot:
            shown = [f"{TRAIN} training loss {progress.train[-1][1]:.3f}"] if progress.train else []
            shown += [f"{VALID} validation loss {progress.valid[-1][1]:.3f}"] if progress.valid else []
            drawn.append(Text("   ".join(shown), style="dim"))
        return Group(*drawn)

    def _state(self) -> str:
        status = self._job.status.replace("_", " ")
        if self._is_lost:
            return f"{status}; the server does not answer, trying again (Ctrl-C leaves the job running)"
        return status if self._job.is_over else f"{status} (Ctrl-C: detach or cancel)"

    def _left(self) -> str:
        finish = self._job.estimated_finish
        left_s = None if finish is None or self._job.status != "running" else finish - time.time()
        if left_s is None or left_s < 1:
            return ""
        return f", about {left_s / 60:.0f} min left" if left_s >= 120 else f", about {left_s:.0f} s left"
