"""The interface of executors, which compute plans of steps."""

from typing import Protocol

from stellarbyte_server.engine.run.step_plan import Finish, StepPlan, StepResult


class OutOfDeviceMemory(Exception):
    """A step needs more memory than there is; nothing that it was to compute counts."""


class DeviceLost(Exception):
    """The device will not compute anything any more, whatever it is given: only a new process gets it back."""


class ExecutorStep(Protocol):
    """A step that was started and not read yet."""

    def finish(self, finish: Finish) -> None:
        """Sample what needs the host. Called once, when the results of all earlier steps have been read.

        Raises:
            OutOfDeviceMemory, DeviceLost
        """

    def result(self) -> StepResult:
        """Wait for the step. Called once, after `finish`.

        Raises:
            DeviceLost
        """
        ...


class Executor(Protocol):
    """Computes plans, in the order in which they were made. Engine thread only."""

    num_steps_ahead: int
    """0: a step must be read before the next is started. 1: one step may be in flight meanwhile."""

    def start(self, plan: StepPlan) -> ExecutorStep:
        """Begin to compute a step.

        Raises:
            OutOfDeviceMemory, DeviceLost
        """
        ...

    def recover(self) -> None:
        """A step failed: the next plan names its decoding slots, and begins those of the failed step anew. No step is
        in flight.

        Raises:
            DeviceLost
        """
        ...

    def prepare(self) -> bool:
        """Do a little of what later steps would have to do first; whether there is more, now or in a moment. Called
        when no step is in flight."""
        ...
