"""The runner of scheduled chunks: it plans steps of them, and has an executor compute the plans."""

from collections.abc import Iterable
from typing import Protocol

from stellarbyte_server.engine.run.executor import Executor, ExecutorStep
from stellarbyte_server.engine.run.planner import PlannedStep, Planner
from stellarbyte_server.engine.run.step_plan import StepResult
from stellarbyte_server.engine.state.sequence import Chunk, Sequence


class RunningStep(Protocol):
    """A step of chunks that was started and not read yet."""

    def finish(self) -> None:
        """Sample what needs the host. Called once, when the results of all earlier steps have been applied: every
        token that was known to come is then in its sequence. Some sequences may be over, whose tokens are dropped.

        Raises:
            OutOfDeviceMemory, DeviceLost
        """

    def result(self) -> StepResult:
        """Wait for the step: what it computed, by number of chunk. Called once, after `finish`."""
        ...


class Runner(Protocol):
    """Computes chunks of sequences, whose block tables are those of now. Engine thread only."""

    num_steps_ahead: int
    """As an executor's."""

    def start(self, chunks: list[Chunk]) -> RunningStep:
        """Begin to compute the chunks. The last token of a sequence may be one that only the executor knows: the one
        that the step before samples for it.

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
    """A step of chunks, over one of a plan."""

    def __init__(self, planned: PlannedStep, step: ExecutorStep) -> None:
        self._planned = planned
        self.step = step

    def finish(self) -> None:
        self.step.finish(self._planned.finish())

    def result(self) -> StepResult:
        return self._planned.by_chunk(self.step.result())


def compute(runner: Runner, chunks: list[Chunk]) -> StepResult:
    """A whole step while no other is in flight; when it fails the runner has recovered before its error is raised."""
    try:
        step = runner.start(chunks)
        step.finish()
        return step.result()
    except Exception:
        runner.recover([chunk.sequence for chunk in chunks])
        raise
