"""From the messages of a training process to changes of its job, and events."""

import time

import msgspec

from stellarbyte_server.tuning.jobs import Change, Checkpoint, Event, Job
from stellarbyte_server.tuning.results import comparison_event, metrics_event
from stellarbyte_server.tuning.worker import ENDS, Message


class Progress:
    """Messages of one process. Steps that an earlier process has told before it was lost are not noted twice."""

    def __init__(self, job: Job) -> None:
        self.end: Message | None = None
        self._last_step = job.last_step
        self._last_evaluation = job.last_evaluation
        self._steps = job.steps or 0
        self._checkpoints = {checkpoint.step for checkpoint in job.checkpoints}
        self._first: tuple[float, int] | None = None  # time and number of the first step of this process
        self._changes: list[Change] = []
        self._events: list[Event] = []

    def add(self, message: Message) -> None:
        if message.type in ENDS:
            self.end = message
        elif message.type == "plan":
            self._steps = message.steps
            self._changes.append(lambda job: msgspec.structs.replace(job, steps=message.steps))
        elif message.type == "step":
            self._add_step(message)
        elif message.type == "evaluation" and message.step > self._last_evaluation:
            self._last_evaluation = message.step
            self._changes.append(lambda job: _evaluated(job, message))
            self._events.append(metrics_event(message.step, self._steps, valid_loss=message.valid_loss))
        elif message.type == "warning":
            self._events.append(Event(message=message.message, level="warn"))
        elif message.type == "compared":
            self._changes.append(lambda job: _compared(job, message.figures))
            self._events.append(comparison_event(message.figures))
        elif message.type == "epoch" and message.step not in self._checkpoints:
            self._checkpoints.add(message.step)
            self._changes.append(lambda job: _with_checkpoint(job, message.step))
            self._events.append(Event(message=f"Checkpoint created at step {message.step}"))

    def _add_step(self, message: Message) -> None:
        now = time.time()
        if self._first is None:
            self._first = now, message.step
        if message.step <= self._last_step:
            return
        self._last_step = message.step
        start, first = self._first
        finish = None
        if message.step > first:
            finish = int(now + (now - start) / (message.step - first) * (self._steps - message.step))
        self._changes.append(lambda job: _stepped(job, message, finish))
        self._events.append(
            metrics_event(
                message.step,
                self._steps,
                train_loss=message.train_loss,
                learning_rate=message.learning_rate,
                tokens=message.tokens,
            )
        )

    def take(self) -> tuple[Change, list[Event]]:
        """The changes and events since the last call."""
        changes, events = self._changes, self._events
        self._changes, self._events = [], []

        def apply(job: Job) -> Job:
            for change in changes:
                job = change(job)
            return job

        return apply, events


def _stepped(job: Job, message: Message, finish: int | None) -> Job:
    return msgspec.structs.replace(
        job,
        last_step=message.step,
        tokens=message.tokens,
        estimated_finish=finish,
        losses=job.losses | {"train": message.train_loss},
    )


def _evaluated(job: Job, message: Message) -> Job:
    name = "valid" if message.step else "base_valid"
    losses = job.losses | {name: message.valid_loss, f"valid@{message.step}": message.valid_loss}
    return msgspec.structs.replace(job, last_evaluation=message.step, losses=losses)


def _compared(job: Job, figures: dict[str, float]) -> Job:
    losses, matches = dict(job.losses), dict(job.exact_match)
    for name, value in figures.items():
        whose, _, what = name.partition("_")
        kept = losses if what == "loss" else matches
        kept["valid" if whose == "eval" else f"{whose}_valid"] = value
    return msgspec.structs.replace(job, losses=losses, exact_match=matches)


def _with_checkpoint(job: Job, step: int) -> Job:
    made = Checkpoint(id=f"{job.result_checkpoint}-{step}", step=step, created_at=int(time.time()))
    return msgspec.structs.replace(job, checkpoints=(*job.checkpoints, made))
