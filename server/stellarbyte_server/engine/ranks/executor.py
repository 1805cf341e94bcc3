"""The executor of rank 0: every plan goes to all ranks, each of which computes it with its own executor.

The logits are the same bits on all ranks, so each samples the same tokens, and no token has to be sent.
"""

from collections.abc import Callable
from typing import TypeVar

from stellarbyte_server.engine.ranks.messages import FinishStep, ReadStep, Recover, StartStep, StepFailed
from stellarbyte_server.engine.ranks.processes import AGREE_LIMIT_S, RankLost, RankProcesses
from stellarbyte_server.engine.run.executor import DeviceLost, Executor, ExecutorStep
from stellarbyte_server.engine.run.step_plan import Finish, StepPlan, StepResult

_T = TypeVar("_T")


class RanksExecutor:
    """An `Executor`, with `own` for this rank. Engine thread only."""

    def __init__(self, own: Executor, others: RankProcesses) -> None:
        self._own = own
        self._others = others
        self.num_steps_ahead = own.num_steps_ahead
        self.takes_drafts = own.takes_drafts
        self.cache = own.cache

    def start(self, plan: StepPlan) -> "RanksStep":
        self._others.send(StartStep(plan))
        return RanksStep(agreed(self._others, lambda: self._own.start(plan)), self._others)

    def recover(self) -> None:
        self._others.send(Recover())
        self._own.recover()

    def prepare(self) -> bool:
        return self._own.prepare()

    def close(self) -> None:
        """End the other ranks."""
        self._others.close()


class RanksStep:
    """A step that all ranks have started."""

    def __init__(self, own: ExecutorStep, others: RankProcesses) -> None:
        self._own = own
        self._others = others

    def finish(self, finish: Finish) -> None:
        self._others.send(FinishStep(finish))
        agreed(self._others, lambda: self._own.finish(finish))

    def result(self) -> StepResult:
        self._others.send(ReadStep())
        return self._own.result()


def agreed(others: RankProcesses, compute: Callable[[], _T]) -> _T:
    """The result of a part of a step. An error of it is raised again if all other ranks have one, too.

    Raises:
        DeviceLost: this rank fails alone, or another has ended.
    """
    try:
        return compute()
    except DeviceLost:
        raise
    except Exception:
        try:
            others.answers(StepFailed, AGREE_LIMIT_S)
        except RankLost as lost:
            raise DeviceLost(f"a step failed on rank 0, but not on all ranks: {lost}") from lost
        raise
