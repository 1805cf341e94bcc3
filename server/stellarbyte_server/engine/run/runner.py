"""What the engine asks of whatever computes its steps. Knows no device."""

from collections.abc import Iterable
from typing import Protocol

from stellarbyte_server.engine.state.sequence import Chunk, Sequence, StepResult


class OutOfDeviceMemory(Exception):
    """A step needs more memory than there is; nothing that it was to compute counts."""


class DeviceLost(Exception):
    """The device will not compute anything any more, whatever it is given: only a new process gets it back."""


class RunningStep(Protocol):
    """A step that was started and not read yet."""

    def finish(self) -> None:
        """Sample what needs the host. Called once, when the results of all earlier steps have been applied: every
        token that was known to come is then in its sequence. Some sequences may be over, whose tokens are dropped.

        Raises:
            OutOfDeviceMemory, DeviceLost
        """

    def result(self) -> StepResult:
        """Wait for the step. Called after `finish`; one token for each chunk that samples, whatever became of it."""
        ...


class Runner(Protocol):
    num_steps_ahead: int
    """0: a step's tokens must be known before the next is scheduled. 1: one step may be in flight meanwhile."""

    def start(self, chunks: list[Chunk]) -> RunningStep:
        """Begin to compute the chunks, whose block tables are those of now. The last token of a sequence may be one
        that only the runner knows: the one that the step before samples for it.

        Raises:
            OutOfDeviceMemory, DeviceLost
        """
        ...

    def recover(self, sequences: Iterable[Sequence]) -> None:
        """A step of these sequences failed: whatever is kept of them is to be made anew, from the tokens they have. No
        step is in flight, and all tokens are known.

        Raises:
            DeviceLost
        """
        ...

    def prepare(self) -> bool:
        """Do a little of what later steps would have to do first; whether there is more, now or in a moment. Called
        when no step is in flight."""
        ...


def compute(runner: Runner, chunks: list[Chunk]) -> StepResult:
    """A whole step while no other is in flight; when it fails the runner has recovered before its error is raised."""
    try:
        step = runner.start(chunks)
        step.finish()
        return step.result()
    except Exception:
        runner.recover([chunk.sequence for chunk in chunks])
        raise
