"""The bank of all ranks, and rank 1 that is sent its part of an adapter while steps go on."""

import threading
from typing import Any

import msgspec
import pytest
import torch

from stellarbyte.lora.bank import LoraBank, PackedAdapter
from stellarbyte.parallel.adapters import cut_adapter
from stellarbyte.parallel.shares import RankShare
from stellarbyte_server.engine.ranks import bank as bank_module
from stellarbyte_server.engine.ranks.bank import RanksBank
from stellarbyte_server.engine.ranks.follower import Follower
from stellarbyte_server.engine.ranks.messages import AdapterBytes, FillSlot, SlotFilled, StartStep, ToRank
from stellarbyte_server.engine.run.step_plan import StepPlan
from tests.support.models.adapters import random_adapter
from tests.support.models.byte_transformer import make_config

CPU = torch.device("cpu")
CONFIG = make_config(num_attention_heads=6, num_key_value_heads=3)
SHARES = [RankShare(config=CONFIG, rank=rank, ranks=2) for rank in range(2)]


def make_bank(rank: int, kind: type[LoraBank] = LoraBank) -> Any:
    return kind(SHARES[rank].own_config, 2, 16, torch.float32, CPU)


class Ranks:
    """Rank 1; without a follower it answers each fill with the number of the slot."""

    def __init__(self) -> None:
        self.follower: Follower | None = None
        self.said: list[SlotFilled] = []
        self.num_bytes: list[int] = []
        self._news = threading.Condition()

    def reply(self, said: Any) -> None:
        with self._news:
            self.said.append(said)
            self._news.notify_all()

    def send_each(self, messages: list[ToRank | None]) -> None:
        (message,) = messages
        assert message is not None
        if isinstance(message, AdapterBytes):
            self.num_bytes.append(len(message.content))
        if self.follower is not None:
            self.follower.take(msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=ToRank))
        elif isinstance(message, FillSlot):
            self.said.append(SlotFilled(f"slot {message.slot}"))

    def answers(self, kind: type[SlotFilled]) -> list[SlotFilled]:
        assert kind is SlotFilled
        with self._news:
            assert self._news.wait_for(lambda: self.said, 60)
            return [self.said.pop(0)]


class FullBank(LoraBank):
    """The first adapter finds no memory."""

    is_full = True

    def fill(self, slot: int, adapter: PackedAdapter, fence: Any = None) -> None:
        if self.is_full:
            raise MemoryError
        super().fill(slot, adapter, fence)


def test_answers_to_a_fill_that_failed_here_are_not_those_to_the_next() -> None:
    own, ranks = make_bank(0, FullBank), Ranks()
    bank = RanksBank(own, SHARES[0], ranks)  # type: ignore[arg-type]
    packed = random_adapter(CONFIG, 1).packed(CONFIG)
    with pytest.raises(MemoryError):
        bank.fill(1, packed)
    own.is_full = False
    with pytest.raises(RuntimeError, match="slot 2"):
        bank.fill(2, packed)


def test_another_rank_gets_its_part_in_small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """With DoRA in some modules, a head and an embedding; between two messages steps can be sent."""
    monkeypatch.setattr(bank_module, "_PIECE_BYTES", 1000)
    ranks, theirs = Ranks(), make_bank(1)
    ranks.follower = Follower(Steps(), theirs, ranks.reply)
    packed = random_adapter(CONFIG, 2, dora=0.5, replaced=("lm_head", "model.embed_tokens"), share=0.8).packed(CONFIG)
    RanksBank(make_bank(0), SHARES[0], ranks).fill(2, packed)  # type: ignore[arg-type]
    assert len(ranks.num_bytes) > 10 and max(ranks.num_bytes) <= 1000
    expected = make_bank(1)
    expected.fill(2, cut_adapter(packed, SHARES[1]))
    assert torch.equal(theirs.numbers_SF[2], expected.numbers_SF[2])
    assert theirs.replaced[2].keys() == expected.replaced[2].keys() == {"lm_head", "model.embed_tokens"}
    for name, matrix in expected.replaced[2].items():
        assert torch.equal(theirs.replaced[2][name], matrix)
    for name in ("ranks_SLP", "d_offsets_SLP", "b_offsets_SLP"):
        assert (getattr(theirs, name) == getattr(expected, name)).all()


class Steps:
    """An executor that notes when a step begins."""

    cache: Any = None
    num_steps_ahead = 0
    takes_drafts = False
    position = 0

    def __init__(self) -> None:
        self.has_begun = threading.Event()

    def start(self, _plan: StepPlan) -> Any:
        self.has_begun.set()

    def recover(self) -> None:
        raise AssertionError

    def prepare(self) -> bool:
        return False


class SlowBank(LoraBank):
    """An adapter is copied when `may_go_on`."""

    may_go_on: threading.Event

    def fill(self, slot: int, adapter: PackedAdapter, fence: Any = None) -> None:
        assert self.may_go_on.wait(60)
        super().fill(slot, adapter, fence)


def test_steps_of_another_rank_run_while_it_copies_an_adapter() -> None:
    ranks, steps, theirs = Ranks(), Steps(), make_bank(1, SlowBank)
    theirs.may_go_on = threading.Event()
    ranks.follower = Follower(steps, theirs, ranks.reply)
    bank = RanksBank(make_bank(0), SHARES[0], ranks)  # type: ignore[arg-type]
    filling = threading.Thread(target=bank.fill, args=(1, random_adapter(CONFIG, 1).packed(CONFIG)))
    filling.start()
    filling.join(0.2)
    ranks.follower.take(StartStep(StepPlan()))
    assert steps.has_begun.is_set() and filling.is_alive() and not ranks.said
    theirs.may_go_on.set()
    filling.join(60)
    assert not filling.is_alive()
