"""A rank other than 0, once it serves: does what rank 0 sends, in that order."""

import traceback
from collections import deque
from collections.abc import Callable

from stellarbyte.lora.bank import LoraBank
from stellarbyte_server.engine.ranks.bank import adapter_of
from stellarbyte_server.engine.ranks.messages import (
    ClearSlot,
    FillSlot,
    FinishStep,
    FromRank,
    ReadStep,
    Recover,
    SlotFilled,
    StartStep,
    StepFailed,
    ToRank,
)
from stellarbyte_server.engine.run.executor import Executor, ExecutorStep


class Follower:
    """The executor and the bank of one rank.

    An error of a step is reported and the rank goes on: a request may make a step fail on all ranks. An error that only
    this rank has ends the group; rank 0 sees to that.
    """

    def __init__(self, executor: Executor, bank: LoraBank, reply: Callable[[FromRank], None]) -> None:
        self._executor = executor
        self._bank = bank
        self._reply = reply
        self._steps: deque[ExecutorStep] = deque()  # not yet read, as on rank 0

    def take(self, message: ToRank) -> None:
        """Do what one message says."""
        if isinstance(message, FillSlot):
            self._fill(message)
        elif isinstance(message, ClearSlot):
            self._bank.clear(message.slot)
        elif isinstance(message, Recover):
            self._steps.clear()  # none is in flight on rank 0
            self._executor.recover()
        else:
            try:
                self._compute(message)
            except Exception as error:
                self._reply(StepFailed("".join(traceback.format_exception(error)).strip()))

    def prepare(self) -> bool:
        """See `Executor.prepare`."""
        return bool(self._steps) or self._executor.prepare()

    def _compute(self, message: ToRank) -> None:
        if isinstance(message, StartStep):
            self._steps.append(self._executor.start(message.plan))
        elif isinstance(message, FinishStep):
            self._steps[-1].finish(message.finish)
        elif isinstance(message, ReadStep):
            self._steps.popleft().result()
        else:
            raise TypeError(f"a rank that serves takes no {type(message).__name__}")

    def _fill(self, message: FillSlot) -> None:
        try:
            fence = self._bank.fence()  # steps that were sent before may read the slot
            self._bank.fill(message.slot, adapter_of(message, self._bank.dtype), fence)
        except Exception as error:
            self._reply(SlotFilled(f"{type(error).__name__}: {error}"))
        else:
            self._reply(SlotFilled(""))
