"""The interface of executors, which compute plans of steps."""

from typing import Protocol

from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte_server.engine.run.step_plan import Finish, StepPlan, StepResult


class OutOfDeviceMemory(Exception):
    """A step needs more memory than the device has; its results are discarded."""


class DeviceLost(Exception):
    """The device cannot compute any more; only a new process can use it again."""


class ExecutorStep(Protocol):
    """A started step with unread results."""

    def finish(self, finish: Finish) -> None:
        """Sample the rows that need the host. Called once, after the results of all earlier steps were read.

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
    """Computes plans in the order of their creation. Engine thread only."""

    num_steps_ahead: int
    """0: a step must be read before the next starts. 1: one step may be in flight at that time."""

    takes_drafts: bool
    """Whether chunks may end in drafts."""

    @property
    def cache(self) -> PagedKVCache:
        """Keys and values of all blocks; with several ranks the part of rank 0."""
        ...

    def start(self, plan: StepPlan) -> ExecutorStep:
        """Start a step.

        Raises:
            OutOfDeviceMemory, DeviceLost
        """
        ...

    def recover(self) -> None:
        """Recover from a failed step: the next plan lists its decoding slots, and begins those of the failed step anew.
        No step is in flight.

        Raises:
            DeviceLost
        """
        ...

    def prepare(self) -> bool:
        """Do one piece of preparation for later steps; returns whether more is left, now or soon. Called when no step
        is in flight."""
        ...
