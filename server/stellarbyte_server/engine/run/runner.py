"""The runner of scheduled chunks: plans steps and lets an executor compute the plans."""

from collections.abc import Iterable
from typing import Protocol

from stellarbyte_server.engine.run.executor import Executor, ExecutorStep
from stellarbyte_server.engine.run.planner import PlannedStep, Planner
from stellarbyte_server.engine.run.step_plan import StepResult
from stellarbyte_server.engine.state.sequence import Chunk, Sequence


class RunningStep(Protocol):
    """A started step of chunks with unread results."""

    def finish(self) -> None:
        """Sample the rows that need the host. Called once, after the results of all earlier steps were applied, so that
        all their tokens are in the sequences. Tokens of ended sequences are dropped.

        Raises:
            OutOfDeviceMemory, DeviceLost
        """

    def result(self) -> StepResult:
        """Wait for the step; returns its results by number of chunk. Called once, after `finish`."""
        ...


class Runner(Protocol):
    """Computes chunks of sequences with their current block tables. Engine thread only."""

    num_steps_ahead: int
    """See `Executor`."""

    def start(self, chunks: list[Chunk]) -> RunningStep:
        """Start computing the chunks. A sequence's last token may be known only to the executor, if the step before
        samples it.

        Raises:
            OutOfDeviceMemory, DeviceLost
        """
        ...

    def recover(self, sequences: Iterable[Sequence]) -> None:
        """Recover from a failed step of these sequences: rebuild their state from their tokens. No step is in flight,
        and all tokens are known.

        Raises:
            DeviceLost
        """
        ...

    def prepare(self) -> bool:
        """See `Executor.prepare`."""
        ...


class PlanRunner:
    """Runs any chunks of sequences by one executor."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.num_steps_ahead = executor.num_steps_ahead
        self._planner = Planner()

    def start(self, chunks: list[Chunk]) -> "PlanStep":
        planned = self._planner.plan(chunks)
        return PlanStep(planned, self.executor.start(planned.plan))

    def recover(self, sequences: Iterable[Sequence]) -> None:
        self._planner.recover(sequences)
        self.executor.recover()

    def prepare(self) -> bool:
        return self.executor.prepare()


class PlanStep:
    """A step of chunks, as one of a plan."""

    def __init__(self, planned: PlannedStep, step: ExecutorStep) -> None:
        self._planned = planned
        self.step = step

    def finish(self) -> None:
        self.step.finish(self._planned.finish())

    def result(self) -> StepResult:
        return self._planned.by_chunk(self.step.result())


def compute(runner: Runner, chunks: list[Chunk]) -> StepResult:
    """Compute a whole step while no other is in flight; on failure, recovers before raising the error."""
    try:
        step = runner.start(chunks)
        step.finish()
        return step.result()
    except Exception:
        runner.recover([chunk.sequence for chunk in chunks])
        raise
