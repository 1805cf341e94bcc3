"""Pinned adapters: names whose current version keeps a slot from the moment when one is idle."""

import logging
from collections.abc import Callable, Mapping

from stellarbyte_server.engine.adapters import refusals
from stellarbyte_server.engine.adapters.memory import AdapterMemory
from stellarbyte_server.engine.adapters.slots import AdapterSlots
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.protocol.messages import CallFailed, LoadAdapter

logger = logging.getLogger("server.engine")


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
        self._promised: set[str] = set()  # names with a version beside the current one that will be pinned

    def promise(self, call: LoadAdapter) -> CallFailed | None:
        """Promise a slot to the version that a call loads, if it asks for one, until `set` or `give_up`; why not."""
        if not call.pinned:
            return None
        if not self._may_pin(call.name):
            return refusals.too_many_pinned(call.call_id, self._others(call.name), self._num_slots)
        self._promised.add(call.name)
        return None

    def give_up(self, name: str) -> None:
        """Note that a load of a name has failed."""
        self._promised.discard(name)

    def _others(self, name: str) -> set[str]:
        return (self._names | self._promised) - {name}

    def _may_pin(self, name: str) -> bool:
        """Whether one slot is left for all adapters that are not pinned."""
        return len(self._others(name)) + 1 < self._num_slots

    def set(self, name: str, pinned: bool) -> None:
        """Pin the current version of a name or not. Fewer adapters are pinned than there are slots."""
        self._promised.discard(name)
        self._names.discard(name)
        if pinned and not self._may_pin(name):
            logger.error("the adapter %s is not pinned: at most one fewer than --max-loras can be", name)
            pinned = False
        if pinned:
            self._names.add(name)
        if name in self._current:
            self._current[name].pinned = pinned

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
