"""Pinned adapters: names whose current version keeps a slot from the moment when one is idle."""

from collections.abc import Callable, Iterable, Mapping

from stellarbyte_server.engine.adapters import refusals
from stellarbyte_server.engine.adapters.memory import AdapterMemory
from stellarbyte_server.engine.adapters.slots import AdapterSlots
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.protocol.messages import CallFailed


class Pins:
    """Engine thread only.

    Args:
        current: the current versions by name, which the registry changes.
        fill: copies a version in memory to the slot that it has been assigned.
    """

    def __init__(
        self,
        slots: AdapterSlots,
        memory: AdapterMemory,
        num_slots: int,
        current: Mapping[str, AdapterVersion],
        fill: Callable[[AdapterVersion, int], None],
    ) -> None:
        self._slots = slots
        self._memory = memory
        self._num_slots = num_slots
        self._current = current
        self._fill = fill
        self._names: set[str] = set()

    def loading(
        self, call_id: str, name: str, pinned: bool | None, loads: Iterable[AdapterVersion]
    ) -> AdapterVersion | CallFailed:
        """A version to load under a name, pinned or not (None: as the current one), or why it cannot be pinned."""
        pins = name in self._names if pinned is None else pinned
        others = self._names.union([version.name for version in loads if version.pinned]) - {name}
        if pins and len(others) + 1 >= self._num_slots:  # one slot is left for all other adapters
            return refusals.too_many_pinned(call_id, others, self._num_slots)
        return AdapterVersion(name=name, files=None, state="loading", pinned=pins)

    def note(self, version: AdapterVersion) -> None:
        """Note that a loaded version becomes its name's current one."""
        (self._names.add if version.pinned else self._names.discard)(version.name)

    def discard(self, name: str) -> None:
        """Note that a name is unloaded."""
        self._names.discard(name)

    def place(self) -> None:
        """Give pinned versions without a slot one that is idle, for which they are read if need be."""
        for version in [self._current[name] for name in self._names if name in self._current]:
            if version.slot or version.state != "ready" or version.is_reading or not self._slots.has_idle:
                continue
            if not version.is_in_memory:
                if self._memory.make_room(1, set()):
                    self._memory.start_read(version)
            elif slot := self._slots.take_free(version):
                self._fill(version, slot)
