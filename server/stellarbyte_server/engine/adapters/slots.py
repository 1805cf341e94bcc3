"""Which adapters lie in the slots that a step can use. Plain Python: decides, touches no tensors.

Slots are given to waiting requests in order of importance: a free one, else the one that was used least recently and by
nobody now. Where all are in use, the most important request without a slot claims one: newcomers that are less
important do not enter it, so it empties as its requests end. After `PATIENCE_S` its requests are preempted. So a
request waits for a slot for a bounded time, and those whose adapter is there do not wait for it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.engine.state.sequence import Sequence

PATIENCE_S = 10.0


class Move(NamedTuple):
    """A slot goes from one adapter, whose running sequences must be preempted first, to another."""

    slot: int
    to: AdapterVersion


@dataclass(eq=False, slots=True)
class _Slot:
    number: int
    version: AdapterVersion | None = None
    num_running: int = 0
    used_at: int = 0  # order of use
    is_filling: bool = False
    is_promised: bool = False  # it was given to a waiting sequence that has not run since
    claim: tuple[float, int] | None = None  # rank of the waiting sequence that is to have it


@dataclass(kw_only=True)
class SlotPlan:
    """What to do for the waiting sequences."""

    fill: list[tuple[AdapterVersion, int]] = field(default_factory=list)  # copy these adapters to these slots
    read: list[AdapterVersion] = field(default_factory=list)  # these are not in memory, most important first
    keep: set[AdapterVersion] = field(default_factory=set)  # in memory, waiting for a slot
    move: Move | None = None


class AdapterSlots:
    """`num_slots` slots, numbered from 1; engine thread only."""

    def __init__(self, num_slots: int) -> None:
        self._slots = [_Slot(number) for number in range(1, num_slots + 1)]
        self._num_uses = 0

    def num_running(self, version: AdapterVersion) -> int:
        """Running sequences with this version."""
        return self._slots[version.slot - 1].num_running if version.slot else 0

    def may_enter(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence can run as far as its adapter is concerned."""
        version = sequence.adapter
        if version is None:
            return True
        if not version.slot:
            return False
        slot = self._slots[version.slot - 1]
        return not slot.is_filling and (slot.claim is None or sequence.rank < slot.claim)

    def enter(self, version: AdapterVersion) -> None:
        """A sequence with this adapter begins to run."""
        slot = self._slots[version.slot - 1]
        assert slot.version is version and not slot.is_filling
        slot.num_running += 1
        slot.is_promised = False
        self._touch(slot)

    def leave(self, version: AdapterVersion) -> None:
        """A sequence with this adapter does not run any more."""
        slot = self._slots[version.slot - 1]
        assert slot.num_running > 0
        slot.num_running -= 1
        self._touch(slot)

    def plan(self, waiting: Iterable[Sequence], now_s: float) -> SlotPlan:
        """Give slots to adapters of waiting sequences, most important first."""
        plan = SlotPlan()
        for slot in self._slots:
            slot.claim = None
        waiting = list(waiting)
        waited_for = {sequence.adapter for sequence in waiting}
        seen: set[AdapterVersion] = set()
        # Slots that are not to be given away: promised ones, and those of more important waiting sequences.
        wanted = {slot.number for slot in self._slots if slot.is_promised and slot.version in waited_for}
        for sequence in waiting:
            version = sequence.adapter
            if version is None or version in seen or version.files is None:
                continue
            seen.add(version)
            if version.slot:
                wanted.add(version.slot)
            elif not version.is_in_memory:
                plan.read.append(version)
            elif (slot_or_none := self._available(wanted)) is not None:
                self._assign(slot_or_none, version)
                plan.fill.append((version, slot_or_none.number))
                wanted.add(slot_or_none.number)
            elif (victim := self._victim(wanted)) is not None:
                plan.keep.add(version)
                victim.claim = sequence.rank
                wanted.add(victim.number)
                if plan.move is None and now_s - sequence.queued_s >= PATIENCE_S:
                    plan.move = Move(victim.number, version)
            else:
                plan.keep.add(version)
            if len(wanted) + len(plan.read) >= len(self._slots):
                break  # there is nothing left to give
        return plan

    def take_free(self, version: AdapterVersion) -> int:
        """Give a version a slot that nobody has, ahead of its first request; 0: there is none."""
        free = next((slot for slot in self._slots if slot.version is None), None)
        if free is None:
            return 0
        self._assign(free, version)
        return free.number

    def move(self, move: Move) -> None:
        """Carry out a plan's move, once nobody uses the slot."""
        self._assign(self._slots[move.slot - 1], move.to)

    def filled(self, number: int) -> None:
        """The copy to a slot has ended."""
        self._slots[number - 1].is_filling = False

    def is_filling(self, version: AdapterVersion) -> bool:
        return bool(version.slot) and self._slots[version.slot - 1].is_filling

    def clear(self, version: AdapterVersion) -> None:
        """Take a version that nobody uses out of its slot."""
        slot = self._slots[version.slot - 1]
        assert slot.version is version and slot.num_running == 0 and not slot.is_filling
        slot.version, version.slot = None, 0

    def _assign(self, slot: _Slot, version: AdapterVersion) -> None:
        assert slot.num_running == 0 and not slot.is_filling
        if slot.version is not None:
            slot.version.slot = 0
        slot.version, version.slot = version, slot.number
        slot.is_filling = slot.is_promised = True
        self._touch(slot)

    def _available(self, wanted: set[int]) -> _Slot | None:
        """A slot without adapter, else the least recently used one that nobody uses or waits for."""
        idle = [slot for slot in self._slots if self._is_idle(slot) and slot.number not in wanted]
        return min(idle, key=lambda slot: (slot.version is not None, slot.used_at), default=None)

    def _victim(self, wanted: set[int]) -> _Slot | None:
        """The slot in use that will probably be free first."""
        used = [slot for slot in self._slots if slot.num_running and slot.number not in wanted]
        return min(used, key=lambda slot: (slot.num_running, slot.used_at), default=None)

    def _is_idle(self, slot: _Slot) -> bool:
        return slot.num_running == 0 and not slot.is_filling

    def _touch(self, slot: _Slot) -> None:
        self._num_uses += 1
        slot.used_at = self._num_uses
