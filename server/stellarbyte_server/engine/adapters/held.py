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
        self._versions: dict[str, AdapterVersion] = {}  # by the id of the call that loads it

    def add(self, call_id: str, version: AdapterVersion) -> None:
        self._versions[call_id] = version

    def __contains__(self, version: AdapterVersion) -> bool:
        return self._versions.get(self._loads.get(version, "")) is version

    def commit(self, call_id: str, held_id: str) -> list[Reply]:
        """Make a held version, which has been read, that of its name."""
        version = self._versions.pop(held_id, None)
        if version is None or not version.content_hash or self._loads.pop(version, None) is None:
            return [refusals.not_held(call_id)]
        return self._install(call_id, version)

    def discard(self, call_id: str, held_id: str) -> list[Reply]:
        """Forget a held version, also one that is still being read; unknown ids are ignored."""
        version = self._versions.pop(held_id, None)
        if version is None or self._loads.pop(version, None) is None:
            return [Settled(call_id)]
        return [*self._drain(version), Settled(call_id)]

    def settle(self, call_id: str) -> None:
        """`Adapters.collect` returns the answer when all earlier scans of the disk have been processed."""
        self._store.look(lambda: None, lambda _: [Settled(call_id)])
