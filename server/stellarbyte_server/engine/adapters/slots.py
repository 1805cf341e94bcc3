"""The assignment of adapters to slots of the bank. Decisions only, without tensors.

Waiting requests get slots in order of rank: a free one, else the least recently used one without running requests. If
all are in use, the first request without a slot claims one: requests of lower rank for that slot's adapter do not
start, so it empties as its requests end. After `PATIENCE_S` its requests are preempted. So a request waits for a slot
for a bounded time, and requests with a resident adapter do not wait. A pinned adapter keeps its slot; fewer
adapters are pinned than there are slots.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.engine.state.sequence import Sequence

PATIENCE_S = 10.0


class Move(NamedTuple):
    """A change of a slot's adapter, before which running sequences of the old one must be preempted."""

    slot: int
    to: AdapterVersion


@dataclass(eq=False, slots=True)
class _Slot:
    number: int
    version: AdapterVersion | None = None
    num_running: int = 0
    used_at: int = 0  # order of use
    is_filling: bool = False
    is_promised: bool = False  # assigned to a waiting sequence that has not run yet
    claim: tuple[float, int] | None = None  # rank of the waiting sequence that claims it


@dataclass(kw_only=True)
class SlotPlan:
    """Reads and copies for waiting sequences."""

    fill: list[tuple[AdapterVersion, int]] = field(default_factory=list)  # adapters to copy, and their slots
    read: list[AdapterVersion] = field(default_factory=list)  # adapters to read into memory, in order of rank
    keep: set[AdapterVersion] = field(default_factory=set)  # in memory, waiting for a slot
    move: Move | None = None


class AdapterSlots:
    """`num_slots` slots, numbered from 1; engine thread only."""

    def __init__(self, num_slots: int) -> None:
        self._slots = [_Slot(number) for number in range(1, num_slots + 1)]
        self._num_uses = 0

    def versions(self) -> set[AdapterVersion]:
        """Those that have a slot."""
        return {slot.version for slot in self._slots if slot.version is not None}

    @property
    def has_idle(self) -> bool:
        """Whether `take_free` has a slot for a pinned version."""
        return self._available(self._pinned()) is not None

    @property
    def num_used(self) -> int:
        """Slots that hold an adapter, or are being filled."""
        return sum(slot.version is not None for slot in self._slots)

    def num_running(self, version: AdapterVersion) -> int:
        """Running sequences with this version."""
        return self._slots[version.slot - 1].num_running if version.slot else 0

    def may_enter(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence's adapter allows it to run."""
        version = sequence.adapter
        if version is None:
            return True
        if not version.slot:
            return False
        slot = self._slots[version.slot - 1]
        return not slot.is_filling and (slot.claim is None or sequence.rank < slot.claim)

    def enter(self, version: AdapterVersion) -> None:
        """Note that a sequence with this adapter starts to run."""
        slot = self._slots[version.slot - 1]
        assert slot.version is version and not slot.is_filling
        slot.num_running += 1
        slot.is_promised = False
        self._touch(slot)

    def leave(self, version: AdapterVersion) -> None:
        """Note that a sequence with this adapter stops running."""
        slot = self._slots[version.slot - 1]
        assert slot.num_running > 0
        slot.num_running -= 1
        self._touch(slot)

    def plan(self, waiting: Iterable[Sequence], now_s: float) -> SlotPlan:
        """Assign slots to adapters of waiting sequences, in order of rank."""
        plan = SlotPlan()
        for slot in self._slots:
            slot.claim = None
        waiting = list(waiting)
        waited_for = {sequence.adapter for sequence in waiting}
        seen: set[AdapterVersion] = set()
        # Slots to keep: promised and pinned ones, and those of waiting sequences of higher rank.
        wanted = {
            slot.number for slot in self._slots if slot.is_promised and slot.version in waited_for
        } | self._pinned()
        for sequence in waiting:
            version = sequence.adapter
            if version is None or version in seen or not version.is_found:
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
                break  # no slot is left
        return plan

    def take_free(self, version: AdapterVersion) -> int:
        """Assign a version a free slot, or a pinned one an idle slot, ahead of its first request; 0: there is none."""
        if version.pinned:
            free = self._available(self._pinned())
        else:
            free = next((slot for slot in self._slots if slot.version is None), None)
        if free is None:
            return 0
        self._assign(free, version)
        return free.number

    def move(self, move: Move) -> None:
        """Execute a plan's move, once no running sequence uses the slot."""
        self._assign(self._slots[move.slot - 1], move.to)

    def filled(self, number: int) -> None:
        """Note that the copy to a slot has ended."""
        self._slots[number - 1].is_filling = False

    def is_filling(self, version: AdapterVersion) -> bool:
        return bool(version.slot) and self._slots[version.slot - 1].is_filling

    def clear(self, version: AdapterVersion) -> None:
        """Remove an unused version from its slot."""
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
        """A slot without adapter, else the least recently used one without running or waiting sequences."""
        idle = [slot for slot in self._slots if self._is_idle(slot) and slot.number not in wanted]
        return min(idle, key=lambda slot: (slot.version is not None, slot.used_at), default=None)

    def _pinned(self) -> set[int]:
        return {slot.number for slot in self._slots if slot.version is not None and slot.version.pinned}

    def _victim(self, wanted: set[int]) -> _Slot | None:
        """The slot in use that will probably empty first."""
        used = [slot for slot in self._slots if slot.num_running and slot.number not in wanted]
        return min(used, key=lambda slot: (slot.num_running, slot.used_at), default=None)

    def _is_idle(self, slot: _Slot) -> bool:
        return slot.num_running == 0 and not slot.is_filling

    def _touch(self, slot: _Slot) -> None:
        self._num_uses += 1
        slot.used_at = self._num_uses
