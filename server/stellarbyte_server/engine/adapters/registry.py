"""The registry of adapters: names, versions, their users and their memory.

A name has one current version, and perhaps others beside it (`names.py`). Other threads find, read and check its files
(`AdapterStore`); this code runs on the engine's thread between steps and reads no files. A version that is replaced or
unloaded drains (`lifetime.py`): it serves the requests bound to it and is then forgotten. Memory has three tiers:
slots of the bank, CPU memory, disk. Least recently used versions move down; versions of running requests do not move.
Mixes of versions are versions, too (`mixes.py`).
"""

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial

from stellarbyte_server.engine.adapters import refusals
from stellarbyte_server.engine.adapters.folder import AdapterFolder, stored_files
from stellarbyte_server.engine.adapters.lifetime import Lifetimes
from stellarbyte_server.engine.adapters.listing import AdapterListing, all_cards, card_of, located
from stellarbyte_server.engine.adapters.loads import Load, Loads
from stellarbyte_server.engine.adapters.memory import AdapterMemory, AdapterStore, FillDone, Looked, ReadDone
from stellarbyte_server.engine.adapters.names import AdapterNames
from stellarbyte_server.engine.adapters.pins import Pins
from stellarbyte_server.engine.adapters.slots import AdapterSlots, Move
from stellarbyte_server.engine.state.adapter_version import AdapterFiles, AdapterVersion
from stellarbyte_server.engine.state.sequence import Sequence
from stellarbyte_server.protocol.adapter_reference import AdapterMix, AdapterReference
from stellarbyte_server.protocol.adapter_versions import AdapterProbe, RecordedAdapters, SetVersions
from stellarbyte_server.protocol.histogram import Histogram
from stellarbyte_server.protocol.messages import (
    AdapterCard,
    AdapterList,
    AdapterUnloaded,
    CallFailed,
    LoadAdapter,
    Reply,
    Settled,
    adapter_is_loading,
)
from stellarbyte_server.protocol.request import RequestRejected

logger = logging.getLogger("server.engine")

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
        self._loads = Loads()
        self._lifetimes = Lifetimes(store, self.slots, self.memory, self._loads)
        self._names = AdapterNames(folder, store, self._lifetimes, clock, self._note_looked)
        self._pins = Pins(self.slots, self.memory, num_slots, self._names.current, self._lifetimes.fill)
        self._load_seconds = Histogram(LOAD_SECONDS_BOUNDS)
        self._listing = AdapterListing(folder, store, clock, self._list)
        self.num_reads = 0  # completed reads, after which `refusal` may change

    # Requests

    def bind(self, reference: AdapterReference | AdapterMix, caller: str = "") -> AdapterVersion:
        """Bind a new request to the adapter's version for its caller, or to a mix of such, until `release`.

        Raises:
            RequestRejected: an adapter cannot exist, or could not be read. If its files are still being looked up,
                `refusal` reports an absent adapter later.
        """
        version = self._names.version(reference, caller)
        self._lifetimes.bind(version)
        return version

    def bind_version(self, version: AdapterVersion) -> None:
        """Bind a request to a version, which need not have a name, until `release`."""
        self._lifetimes.bind(version)

    def release(self, version: AdapterVersion) -> list[Reply]:
        """Release a request's version when it has ended."""
        return self._lifetimes.release(version)

    def refusal(self, sequence: Sequence) -> RequestRejected | None:
        """Why a bound request cannot run, by the current state of its adapter; None: it can, or may."""
        version, reference = sequence.adapter, sequence.request.adapter
        return None if version is None or reference is None else refusals.refusal_of(version, reference)

    def place(self, waiting: Iterable[Sequence]) -> Move | None:
        """Start moving adapters of waiting requests into slots.

        For a returned move the caller must preempt the sequences that run with the slot's current adapter, then call
        `finish_move`.
        """
        if not self._names.current and not self._lifetimes.others:
            return None
        plan = self.slots.plan(waiting, self._clock())
        for version, slot in plan.fill:
            self._lifetimes.fill(version, slot)
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
        self._lifetimes.fill(move.to, move.slot)

    # Calls of the operator

    def load(self, call: LoadAdapter) -> list[Reply]:
        """Load a version beside the current one of its name; returns the answer, or `collect` does."""
        call_id, name = call.call_id, call.name
        if self._loads.has(name):
            return [adapter_is_loading(call_id, name)]
        if (refusal := refusals.of_load(call_id, name, self._names.current.get(name), call.in_place)) is not None:
            return [refusal]
        if (refusal := self._pins.promise(call)) is not None:
            return [refusal]
        load = Load(call_id=call_id, wants_probe=call.probe)
        if (known := self._names.usable(name, call.files)) is not None:
            return [load.loaded(known, self._card(known), is_used=False)]
        files, content_hash = stored_files(call.files), call.files.content_hash
        self._start(load, AdapterVersion(name=name, files=files, content_hash=content_hash, state="loading"))
        return []

    def locate(self, call_id: str, path: str) -> list[Reply]:
        """Find the files at a path; `collect` returns the answer."""
        self._store.look(partial(self._folder.at, path), partial(located, call_id, path))
        return []

    def restore(self, recorded: RecordedAdapters) -> list[Reply]:
        """Do as the record says: its adapters are available, read on first use; those that are stay as they are."""
        replies: list[Reply] = []
        for adapter in recorded.adapters:
            replies += self._lifetimes.drain(*self._names.restore(adapter))
            self._pins.set(adapter.name, adapter.pinned)
        for name in self._names.unrecorded(recorded):
            replies += self._lifetimes.drain(*self._names.take(name))
            self._pins.set(name, False)
        self._names.withdrawn.update(recorded.withdrawn)
        self._pins.place()
        return replies

    def set_versions(self, call: SetVersions) -> list[Reply]:
        """Set the versions of a name that requests get from now on; all others drain. Returns the answer."""
        if self._loads.has(call.name):
            return [adapter_is_loading(call.call_id, call.name)]
        replaced = self._names.set_versions(call.name, call.current, call.shares)
        if replaced is None:
            return [refusals.no_version(call.call_id, call.name)]
        replies = self._lifetimes.drain(*replaced)
        self._pins.set(call.name, call.pinned)
        current = self._names.current.get(call.name)
        can_fill = current is not None and current.is_in_memory and not current.slot  # a probe has given it one
        if current is not None and can_fill and (slot := self.slots.take_free(current)):
            self._lifetimes.fill(current, slot)
        self._pins.place()
        return [*replies, Settled(call.call_id)]

    def abandon_load(self, name: str) -> list[Reply]:
        """Forget a version of a name, and its pin, whose caller has ended before `set_versions`."""
        replies = self._give_up_loads(name)
        self._pins.give_up(name)
        return [*replies, *self._lifetimes.drain(*self._names.beside.set(name, self._names.beside.shares(name)))]

    def settle(self, call_id: str) -> None:
        """`collect` returns the answer when all earlier scans of the disk have been processed."""
        self._store.look(lambda: None, lambda _: [Settled(call_id)])

    def start_load(self, call_id: str, name: str, files: AdapterFiles) -> None:
        """Read an adapter of the start, which `set_versions` makes current; `collect` returns the answer."""
        self._start(Load(call_id=call_id), AdapterVersion(name=name, files=files, state="loading"))

    def _start(self, load: Load, version: AdapterVersion) -> None:
        self._loads.add(version, load)
        self._lifetimes.others.add(version)
        self.memory.make_room(1, set())
        self.memory.start_read(version)

    def unload(self, call_id: str, name: str) -> list[Reply]:
        """Unload an adapter; returns the answer, or `collect` does when its last request has ended."""
        given_up = self._give_up_loads(name)
        version = self._names.current.get(name)
        if version is not None and version.files is not None:
            return [*given_up, *self._withdraw(call_id, name)]
        given_up += self._lifetimes.drain(*self._names.beside.set(name, ()))  # of a load that was not completed
        if name in self._names.withdrawn or not self._folder.may_offer(name):
            return [*given_up, refusals.no_adapter(call_id, name)]
        self._store.look(partial(self._folder.offered, name), partial(self._note_to_unload, call_id, name))
        return given_up

    def _give_up_loads(self, name: str) -> list[Reply]:
        """End the loads of a name that is unloaded; their caller has ended, as others wait for the name."""
        replies: list[Reply] = []
        for version in self._loads.named(name):
            load = self._loads.take(version)
            assert load is not None
            self._pins.give_up(name)
            replies += [refusals.unloaded_meanwhile(load.call_id, name), *self._lifetimes.drain(version)]
        return replies

    def _note_to_unload(self, call_id: str, name: str, files: AdapterFiles | None) -> list[Reply]:
        """Complete the unloading of a name that was not in use, after looking up its files."""
        return [refusals.no_adapter(call_id, name)] if files is None else self._withdraw(call_id, name)

    def _withdraw(self, call_id: str, name: str) -> list[Reply]:
        versions = self._names.withdraw(name)
        self._pins.set(name, False)
        if not versions:
            return [AdapterUnloaded(call_id, 0)]
        logger.info("unloading adapter %s", name)
        return self._lifetimes.unload(call_id, versions)

    def list_all(self, call_id: str) -> list[Reply]:
        """All available and draining adapters; returns the answer, or `collect` does after a scan of the disk."""
        return self._listing.reply(call_id)

    def _list(self, call_id: str) -> AdapterList:
        others = (*self._names.beside.versions(), *self._lifetimes.others)
        listed = self._names.current.values(), others, self._listing.cards, self._names.withdrawn, self._card
        numbers = self._num_slots, self.slots.num_used, self.memory.num_versions
        return AdapterList(call_id, all_cards(*listed), self._load_seconds.snapshot(), *numbers)

    def _card(self, version: AdapterVersion) -> AdapterCard:
        num_running = sum(map(self.slots.num_running, (version, *self._lifetimes.mixes.of(version))))
        is_current, is_beside = self._names.current.get(version.name) is version, self._names.beside.has(version)
        share = self._names.beside.share(version) if is_current or is_beside else None
        return card_of(version, num_running, is_current=is_current, share=share)

    # Results of other threads

    @property
    def wake_fd(self) -> int | None:
        """A file descriptor that becomes readable when `collect` has results."""
        return None if self._store.wake_up is None else self._store.wake_up.fd

    def close(self) -> None:
        self._store.close()

    def collect(self) -> list[Reply]:
        """Process finished reads and copies; returns answers to calls."""
        replies: list[Reply] = []
        for done in self._store.finished():
            if isinstance(done, Looked):
                replies += done.note()
            elif isinstance(done, FillDone):
                self.slots.filled(done.slot)
                replies += self._note_failed_fill(done) if done.error else self._lifetimes.drop_if_drained(done.version)
            else:
                replies += self._note_read(done)
        return replies

    def _note_looked(self, version: AdapterVersion, files: AdapterFiles | None) -> list[Reply]:
        """Note a version's files; None: there are none."""
        version.files = files
        if files is not None:
            return []
        self.num_reads += 1
        version.state = "failed"
        if self._names.current.get(version.name) is version:
            del self._names.current[version.name]
        self._lifetimes.others.add(version)  # until its requests have been refused
        return self._lifetimes.drop_if_drained(version)

    def _note_read(self, done: ReadDone) -> list[Reply]:
        version, error = done.version, self._note_parts(done) or done.error
        if error:
            return self._note_failed_read(version, error, is_fault=done.is_fault)
        if version.content_hash and version.content_hash != done.content_hash:
            return self._note_changed_files(version)
        self.num_reads += 1
        self.memory.note_read(version)
        self._load_seconds.observe(done.seconds)
        version.invocation = done.invocation  # before the hash, by which readers see that a version is known
        version.content_hash, version.num_bytes, version.rank = done.content_hash, done.num_bytes, done.rank
        version.matched, version.unmatched = done.matched, done.unmatched
        version.is_zero, version.changed_tokens = done.is_zero, done.changed_tokens
        logger.info("read adapter %s@%s in %.0f ms", version.name, version.content_hash[:12], done.seconds * 1000)
        load = self._loads.of(version)
        if load is None:
            version.state = "ready" if version.state == "loading" else version.state
            self._pins.place()
            return self._lifetimes.drop_if_drained(version)
        if load.wants_probe and not self._names.has_content(version):
            if version.is_zero:
                return self.note_probe(version, refusals.changes_nothing(version))
            self._loads.begin_probe(version)
            return []
        return self._go_live(version)

    def take_probes(self) -> list[AdapterVersion]:
        """The versions to be probed, once each; `note_probe` notes the result."""
        return self._loads.take_probes()

    def note_probe(self, version: AdapterVersion, outcome: AdapterProbe | RequestRejected) -> list[Reply]:
        """Note what a probe found, or why the version is refused."""
        load = self._loads.of(version)
        if load is None:
            return []  # it failed meanwhile
        if isinstance(outcome, AdapterProbe):
            return self._go_live(version, outcome)
        self._loads.take(version)
        self._pins.give_up(version.name)
        logger.warning("%s", outcome)
        failed = CallFailed(load.call_id, str(outcome), outcome.code, outcome.param, outcome.retry_after_s)
        return [failed, *self._lifetimes.drain(version)]

    def _go_live(self, version: AdapterVersion, probe: AdapterProbe | None = None) -> list[Reply]:
        """Keep a loaded version beside the current one of its name. Equal stored content changes nothing."""
        load = self._loads.take(version)
        assert load is not None
        old = self._names.current.get(version.name)
        if old is not None and old.is_stored and self._names.has_content(version):
            return [*self._lifetimes.drain(version), load.loaded(old, self._card(old), is_used=False)]
        beside = self._names.beside.find(version.name, version.content_hash)
        if beside is not None and beside.state == "ready" and self._names.beside.share(beside):
            return [*self._lifetimes.drain(version), load.loaded(beside, self._card(beside), probe=probe)]
        version.state = "ready"
        self._lifetimes.others.discard(version)
        before = self._names.beside.keep(version)
        replies = [] if before is None else self._lifetimes.drain(before)
        return [*replies, load.loaded(version, self._card(version), probe=probe)]

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

    def _note_failed_read(self, version: AdapterVersion, error: str, *, is_fault: bool = False) -> list[Reply]:
        self.num_reads += 1
        self.memory.forget(version)
        version.state, version.error, version.failed_at_s = "failed", error, self._clock()
        version.is_fault = is_fault
        logger.warning("adapter %s could not be read: %s", version.name, error)
        load = self._loads.take(version)
        if load is not None:
            self._pins.give_up(version.name)
        failed = [] if load is None else [refusals.not_read(load.call_id, error, is_fault=is_fault)]
        return [*failed, *self._lifetimes.drop_if_drained(version)]

    def _note_failed_fill(self, done: FillDone) -> list[Reply]:
        """After a failed copy, free the slot and refuse the requests that wait for it."""
        self.slots.clear(done.version)
        self._store.clear(done.slot)
        return self._note_failed_read(done.version, done.error, is_fault=True)

    def _note_changed_files(self, version: AdapterVersion) -> list[Reply]:
        """After a change of a version's files, make their content the current version for new requests, except of files
        that never change."""
        if version.is_stored:
            return self._note_failed_read(version, refusals.files_damaged(version))
        if self._names.current.get(version.name) is version:
            self._names.current[version.name] = AdapterVersion(
                name=version.name, files=version.files, totals=version.totals, pinned=version.pinned
            )
            self._lifetimes.others.add(version)
        return self._note_failed_read(version, refusals.files_changed(version))
