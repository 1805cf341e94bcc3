"""Calls to load and unload adapters that have not been answered."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from stellarbyte_server.engine.adapters import refusals
from stellarbyte_server.engine.adapters.memory import AdapterStore
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.protocol.adapter_versions import AdapterProbe
from stellarbyte_server.protocol.messages import AdapterCard, AdapterLoaded, AdapterUnloaded, Reply, Settled


@dataclass(frozen=True, kw_only=True)
class Load:
    """A call that loads a version."""

    call_id: str
    wants_probe: bool = False
    is_beside: bool = False  # the current version stays
    is_held: bool = False  # a version that has been read waits until it is committed or discarded

    def loaded(
        self, version: AdapterVersion, card: AdapterCard, probe: AdapterProbe | None = None, *, is_used: bool = True
    ) -> AdapterLoaded:
        return AdapterLoaded(self.call_id, card, version.matched, version.unmatched, probe, is_used)


class Loads:
    """Versions that are being looked for, read, probed or held for a call. Engine thread only."""

    def __init__(self) -> None:
        self._loads: dict[AdapterVersion, Load] = {}
        self._probed: set[AdapterVersion] = set()  # waiting for a probe, or in one
        self._to_probe: list[AdapterVersion] = []

    def __iter__(self) -> Iterator[AdapterVersion]:
        return iter(self._loads)

    def has(self, name: str) -> bool:
        return any(version.name == name for version in self._loads)

    def add(self, version: AdapterVersion, load: Load) -> None:
        self._loads[version] = load

    def of(self, version: AdapterVersion) -> Load | None:
        return self._loads.get(version)

    def held(self, held_id: str) -> AdapterVersion | None:
        """The version that a call with this id holds, also one that is still being read; None: the load has failed."""
        found = (version for version, load in self._loads.items() if load.is_held and load.call_id == held_id)
        return next(found, None)

    def take(self, version: AdapterVersion) -> Load | None:
        self._probed.discard(version)
        return self._loads.pop(version, None)

    def begin_probe(self, version: AdapterVersion) -> None:
        """Have a version probed, unless that has begun: it may be read again meanwhile."""
        if version not in self._probed:
            self._probed.add(version)
            self._to_probe.append(version)

    def take_probes(self) -> list[AdapterVersion]:
        taken, self._to_probe = self._to_probe, []
        return taken


class HeldLoads:
    """Loads of adapters that are read and checked, until all engines of a server make them current, or none does.

    Engine thread only. A held version is a load of its name, so another one is refused until its end. `go_live` makes
    a loaded version current and returns the answer to its call.
    """

    def __init__(
        self,
        loads: Loads,
        store: AdapterStore,
        go_live: Callable[[AdapterVersion], list[Reply]],
        drain: Callable[[AdapterVersion], list[Reply]],
    ) -> None:
        self._loads = loads
        self._store = store
        self._go_live = go_live
        self._drain = drain

    def commit(self, call_id: str, held_id: str) -> list[Reply]:
        """Make a held version, which has been read, that of its name."""
        version = self._loads.held(held_id)
        if version is None:
            return [refusals.not_held(call_id)]
        self._loads.add(version, Load(call_id=call_id))
        return self._go_live(version)

    def discard(self, call_id: str, held_id: str) -> list[Reply]:
        """Forget a held version, also one that is still being read; unknown ids are ignored."""
        version = self._loads.held(held_id)
        if version is None:
            return [Settled(call_id)]
        self._loads.take(version)
        return [*self._drain(version), Settled(call_id)]

    def settle(self, call_id: str) -> None:
        """`Adapters.collect` returns the answer when all earlier scans of the disk have been processed."""
        self._store.look(lambda: None, lambda _: [Settled(call_id)])


@dataclass(kw_only=True)
class Unload:
    """A call that waits until all versions of a name have drained."""

    call_id: str
    draining: set[AdapterVersion]
    num_freed: int = field(default=0)  # bytes

    def note(self, version: AdapterVersion, num_freed: int) -> list[Reply]:
        """Note that a version has drained; returns the answer after the last one."""
        self.draining.discard(version)
        self.num_freed += num_freed
        return [] if self.draining else [AdapterUnloaded(self.call_id, self.num_freed)]
