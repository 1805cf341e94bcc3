"""The registry of adapters: names, versions, their users and their memory.

A name has one current version. Other threads find, read and check its files (`AdapterStore`); this code runs on the
engine's thread between steps and reads no files. A version that is replaced or unloaded drains: it serves the requests
bound to it and is then forgotten. Memory has three tiers: slots of the bank, CPU memory, disk. Least recently used
versions move down; versions of running requests do not move. Mixes of versions are versions, too (`mixes.py`).
"""

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial

from stellarbyte_server.engine.adapters import refusals
from stellarbyte_server.engine.adapters.folder import AdapterFolder
from stellarbyte_server.engine.adapters.held import HeldLoads
from stellarbyte_server.engine.adapters.listing import AdapterListing, all_cards, card_of
from stellarbyte_server.engine.adapters.memory import AdapterMemory, AdapterStore, FillDone, Looked, ReadDone
from stellarbyte_server.engine.adapters.mixes import AdapterMixes
from stellarbyte_server.engine.adapters.pins import Pins
from stellarbyte_server.engine.adapters.slots import AdapterSlots, Move
from stellarbyte_server.engine.adapters.withdrawn import WithdrawnNames
from stellarbyte_server.engine.state.adapter_version import AdapterFiles, AdapterVersion
from stellarbyte_server.engine.state.sequence import Sequence
from stellarbyte_server.protocol.adapter_reference import AdapterMix, AdapterReference
from stellarbyte_server.protocol.histogram import Histogram
from stellarbyte_server.protocol.messages import (
    AdapterCard,
    AdapterList,
    AdapterLoaded,
    AdapterUnloaded,
    CallFailed,
    Reply,
    adapter_is_loading,
)
from stellarbyte_server.protocol.request import RequestRejected, model_not_found

logger = logging.getLogger("server.engine")

RETRY_FAILED_S = 5.0  # minimum time between attempts to read an adapter that failed
LOAD_SECONDS_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Adapters:
    """Engine thread only.

    Args:
        max_in_memory: versions in CPU memory, more than `num_slots`; draining ones are not counted.
    """

    def __init__(
        self,
        folder: AdapterFolder,
        store: AdapterStore,
        *,
        num_slots: int,
        max_in_memory: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slots = AdapterSlots(num_slots)
        self._num_slots = num_slots
        self._folder = folder
        self._store = store
        self.memory = AdapterMemory(store, self.slots, max_in_memory)
        self._clock = clock
        self._current: dict[str, AdapterVersion] = {}
        self._pins = Pins(self.slots, self.memory, num_slots, self._current, self._fill)
        self._mixes = AdapterMixes()
        self._others: set[AdapterVersion] = set()  # being read to replace a current one, or draining
        self._withdrawn = WithdrawnNames(folder, store)
        self._loads: dict[AdapterVersion, str] = {}  # read for a call → its id; held ones until they are committed
        self.held = HeldLoads(self._loads, store, self._loaded, self._drain)
        self._unloads: dict[AdapterVersion, str] = {}  # draining for a call → its id
        self._load_seconds = Histogram(LOAD_SECONDS_BOUNDS)
        self._listing = AdapterListing(folder, store, clock, self._list)
        self.num_reads = 0  # completed reads, after which `refusal` may change

    # Requests

    def bind(self, reference: AdapterReference | AdapterMix) -> AdapterVersion:
        """Bind a new request to the adapter's current version, or to a mix of current ones, until `release`.

        Raises:
            RequestRejected: an adapter cannot exist, or could not be read. If its files are still being looked up,
                `refusal` reports an absent adapter later.
        """
        version = self._version(reference)
        for bound in version.with_parts:
            bound.num_bound += 1
        self.memory.touch(version)
        return version

    def _version(self, reference: AdapterReference | AdapterMix) -> AdapterVersion:
        if isinstance(reference, AdapterMix):
            parts = tuple((self._version(part), scale) for part, scale in reference.parts)
            return self._mixes.version(reference.name, parts)
        version = self._find(reference.name)
        if version is None:
            raise model_not_found(reference)
        if (refusal := refusals.refusal_of(version, reference)) is not None:
            raise refusal
        return version

    def release(self, version: AdapterVersion) -> list[Reply]:
        """Release a request's version when it has ended."""
        self.memory.touch(version)
        for bound in version.with_parts:
            bound.num_bound -= 1
        return [reply for bound in version.with_parts for reply in self._drop_if_drained(bound)]

    def refusal(self, sequence: Sequence) -> RequestRejected | None:
        """Why a bound request cannot run, by the current state of its adapter; None: it can, or may."""
        version, reference = sequence.adapter, sequence.request.adapter
        return None if version is None or reference is None else refusals.refusal_of(version, reference)

    def place(self, waiting: Iterable[Sequence]) -> Move | None:
        """Start moving adapters of waiting requests into slots.

        For a returned move the caller must preempt the sequences that run with the slot's current adapter, then call
        `finish_move`.
        """
        if not self._current and not self._others:
            return None
        plan = self.slots.plan(waiting, self._clock())
        for version, slot in plan.fill:
            self._fill(version, slot)
        for version in plan.read:
            if not version.is_reading and version.state != "failed" and self.memory.make_room(1, plan.keep):
                if version.state == "ready" and not version.content_hash:
                    version.state = "loading"
                self.memory.start_read(version)
        return plan.move

    def enter(self, version: AdapterVersion) -> None:
        """Note that a sequence with this adapter starts to run."""
        self.memory.touch(version)
        self.slots.enter(version)

    def leave(self, version: AdapterVersion) -> None:
        """Note that a sequence with this adapter stops running."""
        self.slots.leave(version)
        self._pins.place()

    def finish_move(self, move: Move) -> None:
        self.slots.move(move)
        self._fill(move.to, move.slot)

    # Calls of the operator

    def load(self, call_id: str, name: str, path: str, in_place: bool, pinned: bool | None = None) -> CallFailed | None:
        """Load an adapter under `name`; `collect` returns the answer unless it is refused at once.

        A `pinned` one keeps a slot from the moment when one is idle; None: as before under this name.
        """
        if any(version.name == name for version in self._loads):
            return adapter_is_loading(call_id, name)
        if (refusal := refusals.of_load(call_id, name, self._current.get(name), in_place)) is not None:
            return refusal
        version = self._pins.loading(call_id, name, pinned, self._loads)
        if isinstance(version, CallFailed):
            return version
        self._loads[version] = call_id
        self._store.look(
            partial(self._folder.at, path), partial(self._note_looked, version, refusals.no_files(call_id, path))
        )
        return None

    def start_load(self, call_id: str, name: str, files: AdapterFiles) -> None:
        """Read an adapter with known files; `collect` returns the answer."""
        version = AdapterVersion(name=name, files=files, state="loading")
        self._loads[version] = call_id
        self._begin_load(version)

    def _begin_load(self, version: AdapterVersion) -> None:
        self._others.add(version)
        self.memory.make_room(1, set())
        self.memory.start_read(version)

    def unload(self, call_id: str, name: str) -> list[Reply]:
        """Unload an adapter; returns the answer, or `collect` does when its last request has ended."""
        if any(version.name == name for version in self._loads):
            return [adapter_is_loading(call_id, name)]
        version = self._current.get(name)
        if version is not None and version.files is not None:
            return self._withdraw(call_id, name)
        if name in self._withdrawn or not self._folder.may_offer(name):
            return [refusals.no_adapter(call_id, name)]
        self._store.look(partial(self._folder.offered, name), partial(self._note_to_unload, call_id, name))
        return []

    def _note_to_unload(self, call_id: str, name: str, files: AdapterFiles | None) -> list[Reply]:
        """Complete the unloading of a name that was not in use, after looking up its files."""
        return [refusals.no_adapter(call_id, name)] if files is None else self._withdraw(call_id, name)

    def _withdraw(self, call_id: str, name: str) -> list[Reply]:
        version = self._current.pop(name, None)
        self._pins.discard(name)
        self._withdrawn.withdraw(name)
        if version is None:
            return [AdapterUnloaded(call_id, 0)]
        self._unloads[version] = call_id
        logger.info("unloading adapter %s", name)
        return self._drain(version)

    def list_all(self, call_id: str) -> list[Reply]:
        """All available and draining adapters; returns the answer, or `collect` does after a scan of the disk."""
        return self._listing.reply(call_id)

    def _list(self, call_id: str) -> AdapterList:
        listed = self._current.values(), self._others, self._listing.cards, self._withdrawn, self._card
        numbers = self._num_slots, self.slots.num_used, self.memory.num_versions
        return AdapterList(call_id, all_cards(*listed), self._load_seconds.snapshot(), *numbers)

    def _card(self, version: AdapterVersion, is_current: bool) -> AdapterCard:
        num_running = sum(map(self.slots.num_running, (version, *self._mixes.of(version))))
        return card_of(version, num_running, is_current=is_current)

    # Results of other threads

    @property
    def wake_fd(self) -> int | None:
        """Becomes readable when `collect` has results."""
        return self._store.wake_fd

    def collect(self) -> list[Reply]:
        """Process finished reads and copies; returns answers to calls."""
        replies: list[Reply] = []
        for done in self._store.finished():
            if isinstance(done, Looked):
                replies += done.note()
            elif isinstance(done, FillDone):
                self.slots.filled(done.slot)
                replies += self._note_failed_fill(done) if done.error else self._drop_if_drained(done.version)
            else:
                replies += self._note_read(done)
        return replies

    def _note_looked(
        self, version: AdapterVersion, absent: CallFailed | None, files: AdapterFiles | None
    ) -> list[Reply]:
        """Note a version's files; `absent` is the answer to its call if there are none."""
        version.files = files
        if files is not None:
            if version in self._loads:
                self._begin_load(version)
            return []
        self.num_reads += 1
        version.state = "failed"
        if self._current.get(version.name) is version:
            del self._current[version.name]
        self._loads.pop(version, None)
        self._others.add(version)  # until its requests have been refused
        return [*([] if absent is None else [absent]), *self._drop_if_drained(version)]

    def _note_read(self, done: ReadDone) -> list[Reply]:
        version, error = done.version, self._note_parts(done) or done.error
        if error:
            return self._note_failed_read(version, error, is_fault=done.is_fault)
        if version.content_hash and version.content_hash != done.content_hash:
            return self._note_changed_files(version)
        self.num_reads += 1
        self.memory.note_read(version)
        self._load_seconds.observe(done.seconds)
        version.content_hash, version.num_bytes, version.rank = done.content_hash, done.num_bytes, done.rank
        version.matched, version.unmatched = done.matched, done.unmatched
        logger.info("read adapter %s@%s in %.0f ms", version.name, version.content_hash[:12], done.seconds * 1000)
        if version in self.held:
            return [self._answer_to_load(self._loads[version], version)]
        version.state = "ready" if version.state == "loading" else version.state
        call_id = self._loads.pop(version, None)
        replies = [] if call_id is None else self._loaded(call_id, version)
        self._pins.place()
        return replies + self._drop_if_drained(version)

    def _loaded(self, call_id: str, version: AdapterVersion) -> list[Reply]:
        """Make a read version that of its name; returns the answer to the call."""
        version.state = "ready"
        replies = self._install(version)
        self._pins.place()
        return [*replies, self._answer_to_load(call_id, self._current[version.name])]

    def _answer_to_load(self, call_id: str, version: AdapterVersion) -> AdapterLoaded:
        return AdapterLoaded(call_id, self._card(version, is_current=True), version.matched, version.unmatched)

    def _note_parts(self, done: ReadDone) -> str:
        """Note the parts that were read for a mix only; returns why that cannot be used, if one has other content."""
        error = ""
        for read in done.parts:
            part = read.version
            is_other = not read.error and part.content_hash not in ("", read.content_hash)
            error = refusals.files_changed(part) if is_other else error
            if part.is_reading or part.is_in_memory:
                continue  # by itself, meanwhile
            if is_other:
                self._note_changed_files(part)
            elif read.error:
                self._note_failed_read(part, read.error, is_fault=read.is_fault)
            else:
                part.content_hash = read.content_hash
        return error

    def _install(self, version: AdapterVersion) -> list[Reply]:
        """Make a loaded version the current one of its name. Equal content changes nothing."""
        self._withdrawn.discard(version.name)
        self._others.discard(version)
        old = self._current.get(version.name)
        self._pins.note(version)
        is_same = old is not None and old.content_hash == version.content_hash and old.state == "ready"
        if old is not None and is_same and not (version.pinned and not old.slot and not old.is_in_memory):
            old.files, old.pinned = version.files, version.pinned
            self.memory.forget(version)
            return []
        self._current[version.name] = version
        if slot := self.slots.take_free(version):
            self._fill(version, slot)
        if old is None:
            return []
        version.totals = old.totals
        return self._drain(old)

    def _note_failed_read(self, version: AdapterVersion, error: str, *, is_fault: bool = False) -> list[Reply]:
        self.num_reads += 1
        self.memory.forget(version)
        version.state, version.error, version.failed_at_s = "failed", error, self._clock()
        version.is_fault = is_fault
        logger.warning("adapter %s could not be read: %s", version.name, error)
        call_id = self._loads.pop(version, None)
        failed = [] if call_id is None else [refusals.not_read(call_id, error, is_fault=is_fault)]
        return [*failed, *self._drop_if_drained(version)]

    def _note_failed_fill(self, done: FillDone) -> list[Reply]:
        """After a failed copy, free the slot and refuse the requests that wait for it."""
        self.slots.clear(done.version)
        self._store.clear(done.slot)
        return self._note_failed_read(done.version, done.error, is_fault=True)

    def _note_changed_files(self, version: AdapterVersion) -> list[Reply]:
        """After a change of a version's files, make their content the current version for new requests."""
        if self._current.get(version.name) is version:
            self._current[version.name] = AdapterVersion(
                name=version.name, files=version.files, totals=version.totals, pinned=version.pinned
            )
            self._others.add(version)
        return self._note_failed_read(version, refusals.files_changed(version))

    # Names and memory

    def _find(self, name: str) -> AdapterVersion | None:
        """The current version of a name, which the first request for a folder of --adapter-dir creates.

        Its files are then looked up, and again after a failure, as they may have been replaced.
        """
        version = self._current.get(name)
        if version is None and name not in self._withdrawn and self._folder.may_offer(name):
            version = self._current[name] = AdapterVersion(name=name, files=None)
            self._store.look(partial(self._folder.offered, name), partial(self._note_looked, version, None))
        elif version is not None and version.state == "failed" and self._clock() - version.failed_at_s > RETRY_FAILED_S:
            if version.num_bound:  # its last requests will be refused
                self._others.add(version)
            files = version.files
            assert files is not None, "it was found before it failed"
            version = self._current[name] = AdapterVersion(
                name=name, files=None, totals=version.totals, pinned=version.pinned
            )
            self._store.look(partial(self._folder.at, files.asked), partial(self._note_again, version, files))
        return version

    def _note_again(self, version: AdapterVersion, before: AdapterFiles, files: AdapterFiles | None) -> list[Reply]:
        """Retry a version that failed, with its files looked up again; if these are absent, reading reports it."""
        return self._note_looked(version, None, before if files is None else files)

    def _fill(self, version: AdapterVersion, slot: int) -> None:
        self.memory.touch(version)
        self._store.fill(version, slot)

    def _drain(self, version: AdapterVersion) -> list[Reply]:
        version.state, version.pinned = "draining", False
        self._others.add(version)
        return self._drop_if_drained(version)

    def _drop_if_drained(self, version: AdapterVersion) -> list[Reply]:
        """Forget a draining version once it has no users."""
        if version not in self._others or version.num_bound or version.is_reading or self.slots.is_filling(version):
            return []
        freed = (version.num_bytes if version.is_in_memory else 0) + (version.num_bytes if version.slot else 0)
        if version.slot:
            slot = version.slot
            self.slots.clear(version)
            self._store.clear(slot)
        self.memory.forget(version)
        self._others.discard(version)
        call_id = self._unloads.pop(version, None)
        replies: list[Reply] = [] if call_id is None else [AdapterUnloaded(call_id, freed)]
        return replies + [reply for mix in self._mixes.take(version) for reply in self._drain(mix)]
