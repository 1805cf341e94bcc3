"""The end of versions: one that is replaced or unloaded drains, and is forgotten after its last request."""

from stellarbyte_server.engine.adapters.loads import Loads, Unload
from stellarbyte_server.engine.adapters.memory import AdapterMemory, AdapterStore
from stellarbyte_server.engine.adapters.mixes import AdapterMixes
from stellarbyte_server.engine.adapters.slots import AdapterSlots
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.protocol.messages import Reply


class Lifetimes:
    """Versions in use, without a name or before they have one. Engine thread only."""

    def __init__(self, store: AdapterStore, slots: AdapterSlots, memory: AdapterMemory, loads: Loads) -> None:
        self.mixes = AdapterMixes()
        self.others: set[AdapterVersion] = set()  # being read to replace a current one, or draining
        self._unloads: dict[AdapterVersion, Unload] = {}  # versions that drain for a call
        self._store = store
        self._slots = slots
        self._memory = memory
        self._loads = loads

    def bind(self, version: AdapterVersion) -> None:
        """Bind a request to a version until `release`."""
        for bound in version.with_parts:
            bound.num_bound += 1
        self._memory.touch(version)

    def release(self, version: AdapterVersion) -> list[Reply]:
        self._memory.touch(version)
        for bound in version.with_parts:
            bound.num_bound -= 1
        return [reply for bound in version.with_parts for reply in self.drop_if_drained(bound)]

    def unload(self, call_id: str, versions: list[AdapterVersion]) -> list[Reply]:
        """Drain all versions of a name for a call."""
        unload = Unload(call_id=call_id, draining=set(versions))
        self._unloads |= dict.fromkeys(versions, unload)
        return self.drain(*versions)

    def drain(self, *versions: AdapterVersion) -> list[Reply]:
        for version in versions:
            version.state, version.pinned = "draining", False
            self.others.add(version)
        return [reply for version in versions for reply in self.drop_if_drained(version)]

    def drop_if_drained(self, version: AdapterVersion) -> list[Reply]:
        """Forget a draining version once it has no users."""
        is_over = version in self.others and self._loads.of(version) is None
        if not is_over or version.num_bound or version.is_reading or self._slots.is_filling(version):
            return []
        freed = (version.num_bytes if version.is_in_memory else 0) + (version.num_bytes if version.slot else 0)
        if version.slot:
            slot = version.slot
            self._slots.clear(version)
            self._store.clear(slot)
        self._memory.forget(version)
        self.others.discard(version)
        unload = self._unloads.pop(version, None)
        replies: list[Reply] = [] if unload is None else unload.note(version, freed)
        return [*replies, *self.drain(*self.mixes.take(version))]

    def fill(self, version: AdapterVersion, slot: int) -> None:
        self._memory.touch(version)
        self._store.fill(version, slot)
