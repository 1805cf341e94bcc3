"""Calls to load and unload adapters that have not been answered."""

from dataclasses import dataclass, field

from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.protocol.adapter_versions import AdapterProbe
from stellarbyte_server.protocol.messages import AdapterCard, AdapterLoaded, AdapterUnloaded, Reply


@dataclass(frozen=True, kw_only=True)
class Load:
    """A call that loads a version."""

    call_id: str
    wants_probe: bool = False

    def loaded(
        self, version: AdapterVersion, card: AdapterCard, probe: AdapterProbe | None = None, *, is_used: bool = True
    ) -> AdapterLoaded:
        return AdapterLoaded(self.call_id, card, version.matched, version.unmatched, probe, is_used)


class Loads:
    """Versions that are being read or probed for a call. Engine thread only."""

    def __init__(self) -> None:
        self._loads: dict[AdapterVersion, Load] = {}
        self._probed: set[AdapterVersion] = set()  # waiting for a probe, or in one
        self._to_probe: list[AdapterVersion] = []

    def has(self, name: str) -> bool:
        return bool(self.named(name))

    def named(self, name: str) -> list[AdapterVersion]:
        """The versions of a name."""
        return [version for version in self._loads if version.name == name]

    def add(self, version: AdapterVersion, load: Load) -> None:
        self._loads[version] = load

    def of(self, version: AdapterVersion) -> Load | None:
        return self._loads.get(version)

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
