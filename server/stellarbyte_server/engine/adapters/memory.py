"""The adapters in CPU memory: which come and which go."""

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Protocol, TypeVar

from stellarbyte_server.engine.adapters.slots import AdapterSlots
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.protocol.messages import Reply

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ReadDone:
    """A version was read, checked and put into CPU memory; or `error` says in one sentence why not."""

    version: AdapterVersion
    seconds: float  # it took
    error: str = ""
    is_fault: bool = False  # with it: it says nothing against the adapter
    content_hash: str = ""
    num_bytes: int = 0
    rank: int = 0
    matched: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FillDone:
    """A version was copied to a slot; or `error` says in one sentence why not."""

    version: AdapterVersion
    slot: int
    error: str = ""


@dataclass(frozen=True)
class Looked:
    """A look at the disk has ended; `note` takes note of what it found, on the engine's thread."""

    note: Callable[[], list[Reply]]


class AdapterStore(Protocol):
    """Moves adapters between the tiers. `look`, `read` and `fill` return at once and are answered by `finished`."""

    def look(self, look: Callable[[], T], note: Callable[[T | None], list[Reply]]) -> None:
        """Run `look`, one after the other, on a thread that may wait for a disk; `note` gets None if that failed."""

    def read(self, version: AdapterVersion) -> None:
        """Disk to CPU memory."""

    def fill(self, version: AdapterVersion, slot: int) -> None:
        """CPU memory to a slot, which is overwritten."""

    def clear(self, slot: int) -> None:
        """Give the memory of a slot back."""

    def forget(self, version: AdapterVersion) -> None:
        """Give the CPU memory of a version back."""

    def finished(self) -> list[ReadDone | FillDone | Looked]: ...

    @property
    def wake_fd(self) -> int | None:
        """Becomes readable when `finished` has something to tell."""


class NoStore:
    """The store of an engine that has no place to read adapters from."""

    wake_fd = None

    def __init__(self) -> None:
        self._looked: list[Looked] = []

    def look(self, look: Callable[[], T], note: Callable[[T | None], list[Reply]]) -> None:
        found = look()  # at once: there is no folder that it could wait for
        self._looked.append(Looked(lambda: note(found)))

    def read(self, *_: object) -> None:
        raise AssertionError("there is no adapter to read")

    def fill(self, *_: object) -> None:
        raise AssertionError("there is no slot to fill")

    def clear(self, *_: object) -> None:
        raise AssertionError("there is no slot to clear")

    def forget(self, *_: object) -> None:
        raise AssertionError("there is no adapter to forget")

    def finished(self) -> list[ReadDone | FillDone | Looked]:
        looked, self._looked = self._looked, []
        return [*looked]


class AdapterMemory:
    """At most `max_versions` in memory or on their way. Those that drain come on top: they cannot be read again.

    `max_versions` is more than there are slots, so that what waits for a slot always finds a place.
    """

    def __init__(self, store: AdapterStore, slots: AdapterSlots, max_versions: int) -> None:
        self._store = store
        self._slots = slots
        self._max_versions = max_versions
        self._held: set[AdapterVersion] = set()  # in memory, or being read

    def start_read(self, version: AdapterVersion) -> None:
        """Read a version, whether there is room or not."""
        self._held.add(version)
        version.is_reading = True
        self._store.read(version)

    def make_room(self, num_places: int, keep: Set[AdapterVersion]) -> bool:
        """Whether `num_places` more versions may come; what was used least recently goes, but none of `keep`."""
        counted = [version for version in self._held if version.state != "draining"]
        excess = len(counted) + num_places - self._max_versions
        idle = [version for version in counted if version not in keep and self._may_go(version)]
        idle.sort(key=lambda version: (version.num_bound > 0, version.used_at))
        for version in idle[: max(0, excess)]:
            self.forget(version)
        return excess <= len(idle)

    def note_read(self, version: AdapterVersion) -> None:
        version.is_reading, version.is_in_memory = False, True
        self.make_room(0, {version})  # several may have been on their way

    def forget(self, version: AdapterVersion) -> None:
        """Give a version's memory back, or do not expect it any more."""
        if version in self._held:
            self._held.remove(version)
            version.is_reading = version.is_in_memory = False
            self._store.forget(version)

    def _may_go(self, version: AdapterVersion) -> bool:
        """Not while it is moved; nor if its requests might be set back, for its files may be others by then."""
        if version.is_reading or self._slots.is_filling(version):
            return False
        return not (version.slot and version.num_bound)
