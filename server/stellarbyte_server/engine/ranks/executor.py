"""The executor of rank 0: every plan goes to all ranks, each of which computes it with its own executor.

The logits are the same bits on all ranks, so each samples the same tokens; those that the host of a GPU samples are
rank 0's (`GpuRanks.of_first_rank`).
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

from stellarbyte_server.engine.ranks.messages import FinishStep, ReadStep, Recover, StartStep, StepFailed
from stellarbyte_server.engine.ranks.processes import AGREE_LIMIT_S, RankLost, RankProcesses
from stellarbyte_server.engine.run.executor import DeviceLost, Executor, ExecutorStep
from stellarbyte_server.engine.run.step_plan import Finish, StepPlan, StepResult

_T = TypeVar("_T")


class RankExecutor(Executor, Protocol):
    """The executor of one rank's part."""

    @property
    def position(self) -> int:
        """Ranks with the same number have launched the same programs and collectives; 0 where an error of one rank
        reaches the others by itself."""
        ...


class RanksExecutor:
    """An `Executor`, with `own` for this rank. Engine thread only."""

    def __init__(self, own: RankExecutor, others: RankProcesses) -> None:
        self._own = own
        self._others = others
        self.num_steps_ahead = own.num_steps_ahead
        self.takes_drafts = own.takes_drafts
        self.cache = own.cache

    def start(self, plan: StepPlan) -> "RanksStep":
        self._others.send(StartStep(plan))
        return RanksStep(self._agreed(lambda: self._own.start(plan)), self._others, self._agreed)

    def recover(self) -> None:
        self._others.send(Recover())
        self._own.recover()

    def prepare(self) -> bool:
        """Of all ranks; see `captures`."""
        return self._own.prepare()

    def close(self) -> None:
        """End the other ranks."""
        self._others.close()

    def _agreed(self, compute: Callable[[], _T]) -> _T:
        """The result of a part of a step. An error of it is raised again if all other ranks have one, too, at the same
        place: otherwise a rank's next sum would meet the last one that another rank has launched.

        Raises:
            DeviceLost: this rank fails alone or elsewhere than another, or another has ended.
        """
        try:
            return compute()
        except DeviceLost:
            raise
        except Exception:
            try:
                failed = self._others.answers(StepFailed, AGREE_LIMIT_S)
            except RankLost as lost:
                raise DeviceLost(f"a step failed on rank 0, but not on all ranks: {lost}") from lost
            if any(other.position != self._own.position for other in failed):
                raise DeviceLost(
                    "a step failed at different places of the ranks, which cannot go on together"
                ) from None
            raise


class RanksStep:
    """A step that all ranks have started."""

    def __init__(self, own: ExecutorStep, others: RankProcesses, agreed: Callable[[Callable[[], None]], None]) -> None:
        self._own = own
        self._others = others
        self._agreed = agreed

    def finish(self, finish: Finish) -> None:
        self._others.send(FinishStep(finish))
        self._agreed(lambda: self._own.finish(finish))

    def result(self) -> StepResult:
        self._others.send(ReadStep())
        return self._own.result()
