"""The bank of all ranks around ranks that answer when they are asked."""

from typing import Any

import pytest
import torch

from stellarbyte.lora.bank import LoraBank, PackedAdapter
from stellarbyte.parallel.shares import RankShare
from stellarbyte_server.engine.ranks.bank import RanksBank
from stellarbyte_server.engine.ranks.messages import FillSlot, SlotFilled
from tests.support.models.adapters import random_adapter
from tests.support.models.byte_transformer import make_config


class Ranks:
    """Rank 1, which answers each fill with the number of the slot."""

    def __init__(self) -> None:
        self.said: list[SlotFilled] = []

    def send_each(self, messages: list[FillSlot]) -> None:
        self.said += [SlotFilled(f"slot {message.slot}") for message in messages]

    def answers(self, kind: type[SlotFilled]) -> list[SlotFilled]:
        assert kind is SlotFilled
        return [self.said.pop(0)]


class FullBank(LoraBank):
    """The first adapter finds no memory."""

    is_full = True

    def fill(self, slot: int, adapter: PackedAdapter, fence: Any = None) -> None:
        if self.is_full:
            raise MemoryError
        super().fill(slot, adapter, fence)


def test_answers_to_a_fill_that_failed_here_are_not_those_to_the_next() -> None:
    config = make_config()
    share = RankShare(config=config, rank=0, ranks=2)
    own, ranks = FullBank(share.own_config, 2, 16, torch.float32, torch.device("cpu")), Ranks()
    bank = RanksBank(own, share, ranks)  # type: ignore[arg-type]
    packed = random_adapter(config, 1).packed(config)
    with pytest.raises(MemoryError):
        bank.fill(1, packed)
    own.is_full = False
    with pytest.raises(RuntimeError, match="slot 2"):
        bank.fill(2, packed)
