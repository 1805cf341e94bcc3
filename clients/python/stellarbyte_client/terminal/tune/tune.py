"""`stellarbyte tune`: checks examples, starts a job, shows it, compares its model with the base and makes it live."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stellarbyte_client.errors import StellarByteError
from stellarbyte_client.terminal.connection import (
    CommandFailed,
    Connection,
    default_model,
    models_of,
    refusals_explained,
)
from stellarbyte_client.terminal.markdown import printable
from stellarbyte_client.terminal.tune.comparison import compare
from stellarbyte_client.terminal.tune.feedback_file import Format, write_examples
from stellarbyte_client.terminal.tune.job_view import JobView
from stellarbyte_client.terminal.tune.tuning_server import Check, Compared, Job, TuningServer

_WHOLE_LINES = 10_000  # characters: more than any line has
_STATES = {"succeeded": "green", "failed": "red", "cancelled": "red", "running": "yellow"}


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """A job to start. None: the server chooses."""

    examples: Path
    validation: Path | None = None
    suffix: str | None = None
    seed: int | None = None
    hyperparameters: dict[str, float]
    publish: str | None = None  # a name
    share: float | None = None  # of the name's callers
    counts_exact: bool = False
    is_detached: bool = False


class TuneCommands:
    """The commands for one server; every method raises StellarByteError on failure.

    The operator's key, if there is one, is used for everything, since publishing and ratings need it; jobs then belong
    to it.
    """

    def __init__(self, connection: Connection, prompts: Sequence[str] = ()) -> None:
        """`prompts` are compared after a job; without any, a terminal asks for some."""
        key = connection.api_key if connection.admin_api_key is None else connection.admin_api_key
        self._connection = Connection(url=connection.url, api_key=key)
        self._client = self._connection.client()
        self._server = TuningServer(self._client)
        self._prompts = prompts
        width = None if sys.stdout.isatty() else _WHOLE_LINES
        self._console = Console(width=width, highlight=False, markup=False, emoji=False)

    def start(self, settings: TuneSettings) -> int:
        """Check the examples, start a job and follow it. Returns the exit status."""
        default = default_model(models_of(self._client))
        uploaded: dict[str, str] = {}
        try:
            for param, path in (("training_file", settings.examples), ("validation_file", settings.validation)):
                if path is not None:
                    _require_content(path)
                    uploaded[param] = self._server.upload(path)
            method = {"type": "supervised", "supervised": {"hyperparameters": settings.hyperparameters}}
            with self._console.status("checking the examples"):
                checked = self._server.check({**uploaded, "method": method})
            self._say_checked(checked, settings)
            body: dict[str, Any] = {**uploaded, "method": method, "model": default.parent or default.id}
            given = {"suffix": settings.suffix, "seed": settings.seed}
            body |= {name: value for name, value in given.items() if value is not None}
            if settings.counts_exact:
                body["evaluate"] = ["exact_match"]
            if settings.publish is not None:
                share = {} if settings.share is None else {"share": settings.share}
                body["publish"] = {"name": settings.publish, **share}
            job = self._server.start(body)
        except BaseException:
            for file_id in uploaded.values():
                with contextlib.suppress(StellarByteError):
                    self._server.delete_file(file_id)
            raise
        if settings.is_detached:
            self._say(f"Started {job.id}.")
            self._say_detached(job)
            return 0
        return self._follow(job)

    def resume(self, job_id: str) -> int:
        """Follow a job that was started before; a paused one is resumed."""
        job = self._server.job(job_id)
        return self._follow(self._server.resume(job_id) if job.status == "paused" else job)

    def cancel(self, job_id: str) -> None:
        self._server.cancel(job_id)
        self._say(f"Cancelled {job_id}.")

    def delete(self, job_id: str) -> None:
        """Delete the files and the model of a job that is over."""
        job = self._server.job(job_id)
        if not job.is_over:
            raise CommandFailed(f"The job {job_id} is {job.status}; cancel it with --cancel before.")
        model, files = self._server.delete_remains(job)
        self._say(f"Deleted {_count(files, 'file')}" + ("." if model is None else f" and the model {model}."))

    def list(self) -> None:
        jobs = self._server.jobs()
        if not jobs:
            self._say("There are no fine-tuning jobs.")
            return
        table = Table(box=box.SIMPLE_HEAD)
        for column in ("job", "state", "made", "loss", "model"):
            table.add_column(column, no_wrap=True, overflow="fold")
        for job in jobs:
            made = datetime.fromtimestamp(job.created_at).strftime("%Y-%m-%d %H:%M")
            state = Text(job.status, style=_STATES.get(job.status, ""))
            table.add_row(job.id, state, made, _loss(job), printable(job.fine_tuned_model or ""))
        self._console.print(table)

    def back(self, name: str) -> None:
        """Make the version before the current one live again under a name."""
        with refusals_explained(is_admin=True):
            history = self._client.adapters.rollback(name)
        self._say(f"{name} is at version {history.current} again.")

    def write_feedback(self, path: Path, form: Format) -> None:
        """Write a file of examples from the server's ratings."""
        number, left_out = write_examples(self._server.ratings(), path, form)
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        self._say(f"Wrote {_count(number, 'example')} to {path}." + (f" Left out: {reasons}." if reasons else ""))
        if form != "sft" and number:
            self._say("StellarByte does not train on preference data; TRL's DPOTrainer, for one, does.")

    def _say_checked(self, check: Check, settings: TuneSettings) -> None:
        """CommandFailed if the examples cannot be used."""
        files = {"training_file": settings.examples, "validation_file": settings.validation}
        for problem in check.problems:
            file = files.get(problem.param or "")
            place = (
                "" if file is None else f"{file}, line {problem.line}: " if problem.line is not None else f"{file}: "
            )
            sys.stderr.write(printable(f"{place}{problem.message}") + "\n")
        if check.problems:
            raise CommandFailed("No job was started, because of these problems.")
        parts = [_count(check.examples, "example")]
        if check.validation_examples is not None:
            parts.append(f"{check.validation_examples} for validation")
        if check.steps is not None:
            parts.append(_count(check.steps, "step"))
        if check.tokens is not None:
            parts.append(_count(check.tokens, "token"))
        if check.seconds is not None:
            parts.append(
                f"about {check.seconds:.0f} s" if check.seconds < 120 else f"about {check.seconds / 60:.0f} min"
            )
        self._say(f"Checked {settings.examples}: {', '.join(parts)}.")

    def _follow(self, job: Job) -> int:
        view = JobView(self._console, self._server, job)
        while True:
            try:
                job = view.follow()
                break
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    self._say_detached(job)
                    raise
                match _asked("d: detach, the job continues; c: cancel the job; Enter: watch again > "):
                    case "c" | "cancel":
                        job = self._server.cancel(job.id)
                        break
                    case "d" | "detach" | None:
                        self._say_detached(job)
                        return 0
        if job.status != "succeeded":
            reason = "" if job.error is None else f": {job.error.message}"
            raise CommandFailed(
                f"The job {job.id} {'was cancelled' if job.status == 'cancelled' else 'failed'}{reason}"
            )
        self._say_model(job)
        self._compare(job)
        return 0

    def _say_model(self, job: Job) -> None:
        assert job.fine_tuned_model is not None, "the job has succeeded"
        self._say(f"The new model is {job.fine_tuned_model}.")
        self._say_compared("Validation loss", job.losses, ".3f")
        if job.exact_match is not None:
            self._say_compared("Exact answers", job.exact_match, ".0%")
        if job.publish is None:
            return
        if job.publish.version is None:
            self._say(f"It is not live as {job.publish.name}: {job.publish.error}")
            return
        share = "" if job.publish.share is None else f" for {job.publish.share:.0%} of its callers"
        self._say(
            f"It is live as {job.publish.name}{share}, version {job.publish.version}; stellarbyte tune --back"
            f" {job.publish.name} goes back."
        )

    def _say_compared(self, figure: str, of: Compared, form: str) -> None:
        named = (("without it", of.base_valid), ("with the version before", of.previous_valid), ("with it", of.valid))
        parts = [f"{value:{form}} {model}" for model, value in named if value is not None]
        if parts:
            self._say(f"{figure}: {', '.join(parts)}.")

    def _compare(self, job: Job) -> None:
        """Show answers of the base and of the new model."""
        is_asked = not self._prompts and sys.stdin.isatty() and self._console.is_terminal
        if not (self._prompts or is_asked):
            return
        from stellarbyte_client.terminal.answers import Asker  # takes half a second

        assert job.fine_tuned_model is not None, "the job has succeeded"
        models = (job.model, job.fine_tuned_model)
        for prompt in self._prompts:
            self._console.print(Text(printable(prompt), style="bold"))
            answers = compare(self._console, Asker(self._connection), models, prompt)
            if (problem := next((each.problem for each in answers if each.problem is not None), None)) is not None:
                raise CommandFailed(problem)
        while is_asked and (typed := _asked("A prompt for both models (Enter: done) > ")):
            with contextlib.suppress(KeyboardInterrupt):
                compare(self._console, Asker(self._connection), models, typed)

    def _say_detached(self, job: Job) -> None:
        self._say(f"The job continues on the server; stellarbyte tune --resume {job.id} shows it again.")

    def _say(self, text: str) -> None:
        self._console.print(Text(printable(text)), soft_wrap=True)


def _require_content(path: Path) -> None:
    """CommandFailed unless this is a file with something in it."""
    try:
        if path.is_dir() or not path.stat().st_size:
            raise CommandFailed(f"{path} must be a file with one example per line; it is {_what(path)}.")
    except OSError as error:
        raise CommandFailed(f"{path} cannot be read: {error.strerror}.") from None


def _what(path: Path) -> str:
    return "a folder" if path.is_dir() else "empty"


def _asked(question: str, read: Callable[[str], str] = input) -> str | None:
    """A line that the user types; None at Ctrl-C or Ctrl-D."""
    try:
        return read(question).strip()
    except (KeyboardInterrupt, EOFError):
        sys.stdout.write("\n")
        return None


def _loss(job: Job) -> str:
    if job.losses.valid is not None:
        return f"{job.losses.valid:.3f} valid"
    return "" if job.losses.train is None else f"{job.losses.train:.3f}"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
