"""Held loads: adapters that are read and checked, until all engines of a server make them current, or none does."""

from collections.abc import Callable

from stellarbyte_server.engine.adapters import refusals
from stellarbyte_server.engine.adapters.memory import AdapterStore
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.protocol.messages import Reply, Settled


class HeldLoads:
    """Engine thread only.

    A held version is a load of its name, so another one is refused, until it is committed or discarded.
    """

    def __init__(
        self,
        loads: dict[AdapterVersion, str],
        store: AdapterStore,
        install: Callable[[str, AdapterVersion], list[Reply]],
        drain: Callable[[AdapterVersion], list[Reply]],
    ) -> None:
        """`loads`: the registry's, by version; `install` makes a version current and returns the answer to a call."""
        self._loads = loads
        self._store = store
        self._install = install
        self._drain = drain
        self._ids: set[str] = set()  # of the calls that load held versions

    def add(self, call_id: str) -> None:
        """Hold what the call with this id, which comes next, loads."""
        self._ids.add(call_id)

    def __contains__(self, version: AdapterVersion) -> bool:
        return self._loads.get(version) in self._ids

    def _take(self, held_id: str) -> AdapterVersion | None:
        """Take a held version, or one that is still being read, out of the loads; None: the load has failed."""
        if held_id not in self._ids:
            return None
        self._ids.discard(held_id)
        version = next((version for version, call_id in self._loads.items() if call_id == held_id), None)
        if version is not None:
            del self._loads[version]
        return version

    def commit(self, call_id: str, held_id: str) -> list[Reply]:
        """Make a held version, which has been read, that of its name."""
        version = self._take(held_id)
        return [refusals.not_held(call_id)] if version is None else self._install(call_id, version)

    def discard(self, call_id: str, held_id: str) -> list[Reply]:
        """Forget a held version, also one that is still being read; unknown ids are ignored."""
        version = self._take(held_id)
        return [*([] if version is None else self._drain(version)), Settled(call_id)]

    def settle(self, call_id: str) -> None:
        """`Adapters.collect` returns the answer when all earlier scans of the disk have been processed."""
        self._store.look(lambda: None, lambda _: [Settled(call_id)])
