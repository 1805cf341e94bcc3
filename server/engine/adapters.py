"""The registry of adapters: names, versions, who uses them, in which memory they lie. Knows no tensors, no formats.

A name has one current version. Loading reads and checks it on another thread (`AdapterStore`); everything here happens
on the engine's thread, between two steps. A version that is replaced or unloaded drains: it serves the requests that
were bound to it, then it is forgotten. Memory has three tiers: slots of the bank, CPU memory, disk; what is used least
recently moves down, and nothing that a running request uses moves.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from server.engine.adapter_folder import AdapterFolder
from server.engine.adapter_slots import AdapterSlots, Move
from server.engine.adapter_version import AdapterFiles, AdapterVersion
from server.engine.messages import (
    AdapterCard,
    AdapterList,
    AdapterLoaded,
    AdapterUnloaded,
    CallFailed,
    LoadSeconds,
    Reply,
)
from server.engine.request import ADAPTER_FAILED, ADAPTER_NOT_FOUND, MODEL_NOT_FOUND, RequestRejected
from server.engine.sequence import Sequence
from server.settings import ADAPTER_NAME_RULE, is_adapter_name

logger = logging.getLogger("server.engine")

RETRY_FAILED_S = 5.0  # a request for an adapter that could not be read makes us look again after this time
MIN_PIN_DIGITS = 8  # of a hash that pins a version
LOAD_SECONDS_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class ReadDone:
    """A version was read, checked and put into CPU memory; or `error` says in one sentence why not."""

    version: AdapterVersion
    seconds: float  # it took
    error: str = ""
    content_hash: str = ""
    num_bytes: int = 0
    rank: int = 0
    matched: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FillDone:
    """A version was copied to a slot."""

    version: AdapterVersion
    slot: int


class AdapterStore(Protocol):
    """Moves adapters between the tiers. `read` and `fill` return at once and are answered by `finished`."""

    def read(self, version: AdapterVersion) -> None:
        """Disk to CPU memory."""

    def fill(self, version: AdapterVersion, slot: int) -> None:
        """CPU memory to a slot, which is overwritten."""

    def clear(self, slot: int) -> None:
        """Give the memory of a slot back."""

    def forget(self, version: AdapterVersion) -> None:
        """Give the CPU memory of a version back."""

    def finished(self) -> list[ReadDone | FillDone]: ...

    @property
    def wake_fd(self) -> int | None:
        """Becomes readable when `finished` has something to tell."""


class NoStore:
    """The store of an engine that has no place to read adapters from."""

    wake_fd = None

    def read(self, *_: object) -> None:
        raise AssertionError("there is no adapter to read")

    def fill(self, *_: object) -> None:
        raise AssertionError("there is no slot to fill")

    def clear(self, *_: object) -> None:
        raise AssertionError("there is no slot to clear")

    def forget(self, *_: object) -> None:
        raise AssertionError("there is no adapter to forget")

    def finished(self) -> list[ReadDone | FillDone]:
        return []


def no_adapters() -> "Adapters":
    """The registry of an engine that has none."""
    return Adapters(AdapterFolder(None, {}), NoStore(), num_slots=0, max_in_memory=1)


@dataclass(kw_only=True)
class _Load:
    """A call that waits for a version to be read."""

    call_id: str
    version: AdapterVersion


@dataclass(kw_only=True)
class _Unload:
    """A call that waits for a version to drain."""

    call_id: str
    version: AdapterVersion


class Adapters:
    """Engine thread only.

    Args:
        max_in_memory: versions in CPU memory at most; those that drain come on top.
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
        self._max_in_memory = max_in_memory
        self._clock = clock
        self._current: dict[str, AdapterVersion] = {}
        self._others: set[AdapterVersion] = set()  # being read to replace a current one, or draining
        self._withdrawn: set[str] = set()  # folders of --adapter-dir that were unloaded: offered again once loaded
        self._loads: list[_Load] = []
        self._unloads: list[_Unload] = []
        self._load_seconds = LoadSeconds(bounds=LOAD_SECONDS_BOUNDS, counts=(0,) * (len(LOAD_SECONDS_BOUNDS) + 1))
        self._num_uses = 0

    # Requests

    def bind(self, reference: str) -> AdapterVersion:
        """The version that a new request for NAME or NAME@HASH runs on, counted as used by it until `release`.

        Raises:
            RequestRejected: there is no such adapter, or it could not be read.
        """
        version = self._find(reference.partition("@")[0])
        if version is None:
            raise not_found(reference)
        refusal = _refusal(version, reference)
        if refusal is not None:
            raise refusal
        version.num_bound += 1
        version.num_requests += 1
        self._touch(version)
        return version

    def release(self, version: AdapterVersion) -> list[Reply]:
        """A bound request has ended."""
        version.num_bound -= 1
        self._touch(version)
        return self._drop_if_drained(version)

    def refusal(self, sequence: Sequence) -> RequestRejected | None:
        """Why a bound request cannot run after all, now that more is known of its adapter."""
        version, reference = sequence.adapter, sequence.request.adapter
        return None if version is None or reference is None else _refusal(version, reference)

    def place(self, waiting: Iterable[Sequence]) -> Move | None:
        """Bring adapters of waiting requests towards the slots.

        A move that is returned waits for the caller to stop the sequences that run with the slot's present adapter;
        then `finish_move` carries it out.
        """
        if not self._current and not self._others:
            return None
        plan = self.slots.plan(waiting, self._clock())
        for version, slot in plan.fill:
            self._fill(version, slot)
        for version in plan.read:
            self._read(version, plan.keep)
        return plan.move

    def may_enter(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence can run as far as its adapter is concerned."""
        return self.slots.may_enter(sequence)

    def enter(self, version: AdapterVersion) -> None:
        """A sequence with this adapter begins to run."""
        self._touch(version)
        self.slots.enter(version)

    def leave(self, version: AdapterVersion) -> None:
        """A sequence with this adapter does not run any more."""
        self.slots.leave(version)

    def finish_move(self, move: Move) -> None:
        self.slots.move(move)
        self._fill(move.to, move.slot)

    # Calls of the operator

    def load(self, call_id: str, name: str, path: str, in_place: bool) -> CallFailed | None:
        """Read an adapter and let it have `name`; answered by `collect` unless it is refused at once."""
        if not is_adapter_name(name):
            message = f"{name!r:.200} cannot be an adapter's name; it needs {ADAPTER_NAME_RULE}."
            return CallFailed(call_id, message, param="lora_name")
        if any(load.version.name == name for load in self._loads):
            return CallFailed(call_id, f"The adapter {name!r} is being loaded already.", param="lora_name")
        current = self._current.get(name)
        if current is not None and current.state != "failed" and not in_place:
            message = f"The adapter {name!r} is loaded already; give load_inplace to replace it."
            return CallFailed(call_id, message, param="lora_name")
        files = self._folder.at(path)
        if files is None:
            message = f"There is no adapter {path!r:.300} in --adapter-dir or among --lora-modules."
            return CallFailed(call_id, message, code=ADAPTER_NOT_FOUND, param="lora_path")
        self.start_load(call_id, name, files)
        return None

    def start_load(self, call_id: str, name: str, files: AdapterFiles) -> None:
        version = AdapterVersion(name=name, files=files, state="loading")
        self._make_room(set())
        self._others.add(version)
        self._loads.append(_Load(call_id=call_id, version=version))
        self._start_read(version)

    def unload(self, call_id: str, name: str) -> list[Reply]:
        """Take a name away; answered once the last request on it has ended, which may be at once."""
        if any(load.version.name == name for load in self._loads):
            return [CallFailed(call_id, f"The adapter {name!r} is being loaded; try again later.", param="lora_name")]
        version = self._current.pop(name, None)
        if version is None and (name in self._withdrawn or self._folder.offered(name) is None):
            message = f"There is no adapter {name!r}."
            return [CallFailed(call_id, message, code=ADAPTER_NOT_FOUND, param="lora_name")]
        if self._folder.offered(name) is not None:
            self._withdrawn.add(name)
        if version is None:
            return [AdapterUnloaded(call_id, 0)]
        logger.info("unloading adapter %s", name)
        self._unloads.append(_Unload(call_id=call_id, version=version))
        return self._drain(version)

    def list_all(self, call_id: str) -> AdapterList:
        """Every adapter that can be asked for, and those that drain."""
        for name in self._folder.names():
            self._find(name)
        versions = sorted([*self._current.values(), *self._others], key=lambda version: version.name)
        return AdapterList(
            call_id, tuple(self._card(version) for version in versions), self._load_seconds, self._num_slots
        )

    # What the other threads have done

    @property
    def wake_fd(self) -> int | None:
        """Becomes readable when `collect` has something to note."""
        return self._store.wake_fd

    def collect(self) -> list[Reply]:
        """Take note of finished reads and copies; which calls that answers."""
        replies: list[Reply] = []
        for done in self._store.finished():
            if isinstance(done, FillDone):
                self.slots.filled(done.slot)
                replies += self._drop_if_drained(done.version)
            elif done.error:
                replies += self._note_failed_read(done)
            else:
                replies += self._note_read(done)
        return replies

    def _note_read(self, done: ReadDone) -> list[Reply]:
        version = done.version
        version.is_reading, version.is_in_memory = False, True
        if version.content_hash and version.content_hash != done.content_hash:
            return self._note_failed_read(
                replace(done, error=f"The adapter {version.name!r} has changed on disk; send the request again.")
            )
        self._load_seconds = self._load_seconds.plus(done.seconds)
        version.content_hash, version.num_bytes, version.rank = done.content_hash, done.num_bytes, done.rank
        version.matched, version.unmatched = done.matched, done.unmatched
        if version.state == "loading":
            version.state = "ready"
        logger.info("read adapter %s@%s in %.0f ms", version.name, version.content_hash[:12], done.seconds * 1000)
        replies: list[Reply] = []
        load = self._take_load(version)
        if load is not None:
            replies += self._install(version)
            replies.append(
                AdapterLoaded(load.call_id, self._card(self._current[version.name]), version.matched, version.unmatched)
            )
        return replies + self._drop_if_drained(version)

    def _install(self, version: AdapterVersion) -> list[Reply]:
        """Let a version that was loaded have its name. The same content again changes nothing."""
        self._withdrawn.discard(version.name)
        self._others.discard(version)
        old = self._current.get(version.name)
        if old is not None and old.content_hash == version.content_hash and old.state == "ready":
            old.files = version.files
            self._forget(version)
            return []
        self._current[version.name] = version
        if slot := self.slots.take_free(version):
            self._fill(version, slot)
        if old is None:
            return []
        version.num_requests, version.num_tokens = old.num_requests, old.num_tokens
        return self._drain(old)

    def _note_failed_read(self, done: ReadDone) -> list[Reply]:
        version = done.version
        version.is_reading = False
        self._forget(version)
        version.state, version.error, version.failed_at_s = "failed", done.error, self._clock()
        logger.warning("adapter %s could not be loaded: %s", version.name, done.error)
        load = self._take_load(version)
        failed = [] if load is None else [CallFailed(load.call_id, done.error, code=ADAPTER_FAILED, param="lora_path")]
        return [*failed, *self._drop_if_drained(version)]

    def _take_load(self, version: AdapterVersion) -> _Load | None:
        """The call that waited for a read, which has ended."""
        load = next((load for load in self._loads if load.version is version), None)
        if load is not None:
            self._loads.remove(load)
        return load

    # Tiers

    def _find(self, name: str) -> AdapterVersion | None:
        """The current version of a name; a folder in --adapter-dir becomes one when it is first asked for."""
        version = self._current.get(name)
        if version is not None and version.state == "failed" and self._clock() - version.failed_at_s > RETRY_FAILED_S:
            version = None
        if version is None and name not in self._withdrawn:
            files = self._folder.offered(name)
            if files is not None:
                version = self._current[name] = AdapterVersion(name=name, files=files)
            else:
                self._current.pop(name, None)
        return version

    def _read(self, version: AdapterVersion, keep: set[AdapterVersion]) -> None:
        """Start to read a version that waiting requests need, if there is room in CPU memory beside those to keep."""
        if not version.is_reading and version.state != "failed" and self._make_room(keep):
            if not version.content_hash:
                version.state = "loading"
            self._start_read(version)

    def _start_read(self, version: AdapterVersion) -> None:
        version.is_reading = True
        self._store.read(version)

    def _fill(self, version: AdapterVersion, slot: int) -> None:
        self._touch(version)
        self._store.fill(version, slot)

    def _make_room(self, keep: set[AdapterVersion]) -> bool:
        """Whether another version may come into CPU memory; what was used least recently goes."""
        held = [v for v in self._current.values() if v.is_in_memory or v.is_reading]
        if len(held) < self._max_in_memory:
            return True
        idle = [v for v in held if v.is_in_memory and v not in keep and not self.slots.is_filling(v)]
        oldest = min(idle, key=lambda v: (v.num_bound > 0, v.used_at), default=None)
        if oldest is None:
            return False
        self._forget(oldest)
        return True

    def _forget(self, version: AdapterVersion) -> None:
        version.is_in_memory = False
        self._store.forget(version)

    def _drain(self, version: AdapterVersion) -> list[Reply]:
        version.state = "draining"
        self._others.add(version)
        return self._drop_if_drained(version)

    def _drop_if_drained(self, version: AdapterVersion) -> list[Reply]:
        """Forget a version whose name is gone once nothing needs it any more."""
        if version not in self._others or version.num_bound or version.is_reading or self.slots.is_filling(version):
            return []
        freed = (version.num_bytes if version.is_in_memory else 0) + (version.num_bytes if version.slot else 0)
        if version.slot:
            slot = version.slot
            self.slots.clear(version)
            self._store.clear(slot)
        self._forget(version)
        self._others.discard(version)
        waiting = [unload for unload in self._unloads if unload.version is version]
        for unload in waiting:
            self._unloads.remove(unload)
        return [AdapterUnloaded(unload.call_id, freed) for unload in waiting]

    def _touch(self, version: AdapterVersion) -> None:
        self._num_uses += 1
        version.used_at = self._num_uses

    def _card(self, version: AdapterVersion) -> AdapterCard:
        tier = "slot" if version.slot else "cpu" if version.is_in_memory else "disk"
        return AdapterCard(
            name=version.name,
            state=version.state,
            tier=tier,
            content_hash=version.content_hash,
            root=version.files.shown,
            rank=version.rank,
            num_bytes=version.num_bytes,
            num_running=self.slots.num_running(version),
            num_waiting=version.num_bound - self.slots.num_running(version),
            num_requests=version.num_requests,
            num_tokens=version.num_tokens,
            error=version.error,
        )


def _refusal(version: AdapterVersion, reference: str) -> RequestRejected | None:
    """Why a version does not serve requests for NAME or NAME@HASH, as far as is known before it was read."""
    if version.state == "failed":
        return RequestRejected(version.error, ADAPTER_FAILED, "model")
    _, at, pin = reference.partition("@")
    if at and (len(pin) < MIN_PIN_DIGITS or (version.content_hash and not version.content_hash.startswith(pin))):
        return not_found(reference)
    return None


def not_found(reference: str) -> RequestRejected:
    return RequestRejected(f"The model {reference!r:.200} does not exist.", MODEL_NOT_FOUND, "model")
