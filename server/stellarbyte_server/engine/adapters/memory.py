"""The adapters in CPU memory, and which of them are evicted."""

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Protocol, TypeVar

from stellarbyte_server.engine.adapters.slots import AdapterSlots
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.protocol.messages import AdapterResidency, Reply
from stellarbyte_server.wake_up import WakeUp

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ReadDone:
    """A version was read into CPU memory, or a mix put together there; or `error` says in one sentence why not."""

    version: AdapterVersion
    seconds: float  # duration
    error: str = ""
    is_fault: bool = False  # with error: not the adapter's fault
    content_hash: str = ""
    num_bytes: int = 0
    rank: int = 0
    matched: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    is_zero: bool = False
    changed_tokens: tuple[int, ...] = ()
    invocation: tuple[int, ...] = ()
    parts: "tuple[ReadDone, ...]" = ()  # of a mix: of the parts whose files were read for it, which stay on disk


@dataclass(frozen=True, kw_only=True)
class FillDone:
    """A version was copied to a slot; or `error` says in one sentence why not."""

    version: AdapterVersion
    slot: int
    error: str = ""


@dataclass(frozen=True)
class Looked:
    """A scan of the disk has ended; `note` processes its result on the engine's thread."""

    note: Callable[[], list[Reply]]


class AdapterStore(Protocol):
    """Moves adapters between the tiers. `look`, `read` and `fill` return at once; `finished` returns their results."""

    def look(self, look: Callable[[], T], note: Callable[[T | None], list[Reply]]) -> None:
        """Run scans in order on a thread that may wait for a disk; `note` gets the result, None if the scan failed."""

    def read(self, version: AdapterVersion) -> None:
        """Read a version from disk into CPU memory; or put a mix together of its parts there or on disk."""

    def fill(self, version: AdapterVersion, slot: int) -> None:
        """Copy a version from CPU memory into a slot, in place of its adapter."""

    def clear(self, slot: int) -> None:
        """Free a slot's memory."""

    def forget(self, version: AdapterVersion) -> None:
        """Free a version's CPU memory."""

    def finished(self) -> list[ReadDone | FillDone | Looked]: ...

    @property
    def wake_up(self) -> WakeUp | None:
        """Rings when `finished` has results; None: it has them at once."""

    def close(self) -> None:
        """Stop without further results."""


class AdapterMemory:
    """At most `max_versions` in memory or being read; draining ones, which cannot be read again, are not counted.

    `max_versions` exceeds the number of slots, so that a version waiting for a slot always has a place.
    """

    def __init__(self, store: AdapterStore, slots: AdapterSlots, max_versions: int) -> None:
        self._store = store
        self._slots = slots
        self._max_versions = max_versions
        self._held: dict[AdapterVersion, None] = {}  # in memory, or being read; in the order of their reads
        self._num_uses = 0

    def residency(self) -> AdapterResidency:
        """The adapters that new requests find in slots and in CPU memory, by name."""
        in_slots = self._slots.versions()
        return AdapterResidency(_names_of(in_slots), _names_of(self._held.keys() - in_slots))

    def touch(self, version: AdapterVersion) -> None:
        """Note that a version is used."""
        self._num_uses += 1
        version.used_at = self._num_uses

    @property
    def num_versions(self) -> int:
        """Versions in CPU memory."""
        return sum(version.is_in_memory for version in self._held)

    def start_read(self, version: AdapterVersion) -> None:
        """Read a version, even beyond the limit."""
        self._held[version] = None
        version.is_reading = True
        self._store.read(version)

    def make_room(self, num_places: int, keep: Set[AdapterVersion]) -> bool:
        """Evict least recently used versions, those never used first, except `keep`, for `num_places` more; returns
        whether there is room."""
        counted = [version for version in self._held if version.state != "draining"]
        excess = len(counted) + num_places - self._max_versions
        idle = [version for version in counted if version not in keep and self._may_go(version)]
        idle.sort(key=lambda version: (version.num_bound > 0, version.used_at))
        for version in idle[: max(0, excess)]:
            self.forget(version)
        return excess <= len(idle)

    def note_read(self, version: AdapterVersion) -> None:
        version.is_reading, version.is_in_memory = False, True
        self.make_room(0, {version})  # several may have been in flight

    def forget(self, version: AdapterVersion) -> None:
        """Free a version's memory, or discard its pending read."""
        if version in self._held:
            del self._held[version]
            version.is_reading = version.is_in_memory = False
            self._store.forget(version)

    def _may_go(self, version: AdapterVersion) -> bool:
        """Whether a version may be evicted: not while it is copied, nor while requests are bound, as its files may
        change."""
        if version.is_reading or self._slots.is_filling(version):
            return False
        return not (version.slot and version.num_bound)


def _names_of(versions: Iterable[AdapterVersion]) -> tuple[str, ...]:
    return tuple(sorted({version.name for version in versions if version.state not in ("draining", "failed")}))
