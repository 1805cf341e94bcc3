"""A rank other than 0, once it serves: does what rank 0 sends, in that order."""

import functools
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from stellarbyte.lora.bank import LoraBank
from stellarbyte_server.engine.ranks.bank import adapter_of
from stellarbyte_server.engine.ranks.executor import RankExecutor
from stellarbyte_server.engine.ranks.messages import (
    AdapterBytes,
    Capture,
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
from stellarbyte_server.engine.run.executor import ExecutorStep
from stellarbyte_server.give_way import give_way


class Follower:
    """The executor and the bank of one rank.

    An error of a step is reported and the rank goes on: a request may make a step fail on all ranks. An error that only
    this rank has ends the group; rank 0 sees to that.

    Args:
        reply: any thread may call it.
    """

    def __init__(self, executor: RankExecutor, bank: LoraBank, reply: Callable[[FromRank], None]) -> None:
        self._executor = executor
        self._bank = bank
        self._reply = reply
        self._steps: deque[ExecutorStep] = deque()  # not yet read, as on rank 0
        self._received: list[memoryview] = []  # of an adapter
        self._filler = ThreadPoolExecutor(1, "adapter-filler", functools.partial(_begin_thread, bank))

    def take(self, message: ToRank) -> None:
        """Do what one message says."""
        if isinstance(message, AdapterBytes):
            self._received.append(message.content)
        elif isinstance(message, FillSlot):
            received, self._received = self._received, []
            # Steps that were sent before may read the slot; later ones run while it is filled.
            self._filler.submit(self._fill, message, received, self._bank.fence())
        elif isinstance(message, ClearSlot):
            self._bank.clear(message.slot)
        elif isinstance(message, Recover):
            self._steps.clear()  # none is in flight on rank 0
            self._executor.recover()
        else:
            try:
                self._compute(message)
            except Exception as error:
                error_lines = "".join(traceback.format_exception(error)).strip()
                self._reply(StepFailed(error_lines, self._executor.position))

    def _compute(self, message: ToRank) -> None:
        if isinstance(message, StartStep):
            self._steps.append(self._executor.start(message.plan))
        elif isinstance(message, FinishStep):
            self._steps[-1].finish(message.finish)
        elif isinstance(message, ReadStep):
            self._steps.popleft().result()
        elif isinstance(message, Capture):
            self._executor.prepare()
        else:
            raise TypeError(f"a rank that serves takes no {type(message).__name__}")

    def _fill(self, message: FillSlot, content: list[memoryview], fence: torch.cuda.Event | None) -> None:
        """On a thread of its own."""
        try:
            self._bank.fill(message.slot, adapter_of(message, content, self._bank.dtype), fence)
        except Exception as error:
            self._reply(SlotFilled(f"{type(error).__name__}: {error}"))
        else:
            self._reply(SlotFilled(""))


def _begin_thread(bank: LoraBank) -> None:
    give_way()
    if bank.numbers_SF.is_cuda:
        torch.cuda.set_device(bank.numbers_SF.device)
