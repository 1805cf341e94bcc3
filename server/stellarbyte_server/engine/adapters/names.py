"""The names of adapters, and the version that a request for a name gets."""

from collections.abc import Callable
from functools import partial

from stellarbyte_server.engine.adapters import refusals
from stellarbyte_server.engine.adapters.beside import Shares, VersionsBeside
from stellarbyte_server.engine.adapters.folder import AdapterFolder, stored_files
from stellarbyte_server.engine.adapters.lifetime import Lifetimes
from stellarbyte_server.engine.adapters.memory import AdapterStore
from stellarbyte_server.engine.adapters.withdrawn import WithdrawnNames
from stellarbyte_server.engine.state.adapter_version import AdapterFiles, AdapterVersion
from stellarbyte_server.protocol.adapter_reference import AdapterMix, AdapterReference
from stellarbyte_server.protocol.adapter_versions import RecordedAdapters, RestoredAdapter, StoredAdapter
from stellarbyte_server.protocol.messages import Reply
from stellarbyte_server.protocol.request import model_not_found

RETRY_FAILED_S = 5.0  # minimum time between attempts to read an adapter that failed
NoteFiles = Callable[[AdapterVersion, AdapterFiles | None], list[Reply]]


class AdapterNames:
    """Engine thread only. `note_files` notes the files of a version that are looked up."""

    def __init__(
        self,
        folder: AdapterFolder,
        store: AdapterStore,
        lifetimes: Lifetimes,
        clock: Callable[[], float],
        note_files: NoteFiles,
    ) -> None:
        self.current: dict[str, AdapterVersion] = {}
        self.beside = VersionsBeside()
        self.withdrawn = WithdrawnNames(folder, store)
        self._folder = folder
        self._store = store
        self._lifetimes = lifetimes
        self._clock = clock
        self._note_files = note_files

    def version(self, reference: AdapterReference | AdapterMix, caller: str) -> AdapterVersion:
        """The version for a request of a caller.

        Raises:
            RequestRejected: it cannot exist, or could not be read.
        """
        if isinstance(reference, AdapterMix):
            parts = tuple((self.version(part, caller), scale) for part, scale in reference.parts)
            return self._lifetimes.mixes.version(reference.name, parts)
        current = self._find(reference.name)
        if current is None:
            raise model_not_found(reference)
        version = self.beside.select(current, reference, caller)
        if version is not current and self._may_retry(version):
            version = self._renewed(version)
            self.beside.keep(version)
        refusal = refusals.refusal_of(version, reference)
        if refusal is not None:
            raise refusal
        return version

    def _find(self, name: str) -> AdapterVersion | None:
        """The current version of a name, which the first request for a folder of --adapter-dir creates.

        Its files are then looked up, and again after a failure, as they may have been replaced.
        """
        version = self.current.get(name)
        if version is None and name not in self.withdrawn and self._folder.may_offer(name):
            version = self.current[name] = AdapterVersion(name=name, files=None)
            self._store.look(partial(self._folder.offered, name), partial(self._note_files, version))
        elif version is not None and self._may_retry(version):
            version = self.current[name] = self._renewed(version)
        return version

    def _may_retry(self, version: AdapterVersion) -> bool:
        return version.state == "failed" and self._clock() - version.failed_at_s > RETRY_FAILED_S

    def _renewed(self, failed: AdapterVersion) -> AdapterVersion:
        """Another attempt at a version that failed, with its files looked up again."""
        if failed.num_bound:  # its last requests will be refused
            self._lifetimes.others.add(failed)
        files = failed.files
        assert files is not None, "it was found before it failed"
        version = AdapterVersion(name=failed.name, files=None, totals=failed.totals, pinned=failed.pinned)
        if files.is_stored:
            version.files, version.content_hash = files, failed.content_hash
        else:
            self._store.look(partial(self._folder.at, files.asked), partial(self._note_again, version, files))
        return version

    def _note_again(self, version: AdapterVersion, before: AdapterFiles, files: AdapterFiles | None) -> list[Reply]:
        """Retry a version that failed, with its files looked up again; if these are absent, reading reports it."""
        return self._note_files(version, before if files is None else files)

    def has_content(self, version: AdapterVersion) -> bool:
        """Whether the current version of a loaded version's name has the same content, and is ready."""
        current = self.current.get(version.name)
        return current is not None and current.content_hash == version.content_hash and current.state == "ready"

    def usable(self, name: str, stored: StoredAdapter) -> AdapterVersion | None:
        """The version of a name with these files, if it has been read."""
        for version in (self.current.get(name), self.beside.find(name, stored.content_hash)):
            if version is not None and version.files == stored_files(stored) and version.state == "ready":
                return version
        return None

    def unrecorded(self, recorded: RecordedAdapters) -> list[str]:
        """The names that must not be served by a record: what was unloaded, and stored ones that it does not have."""
        names = {adapter.name for adapter in recorded.adapters}
        withdrawn = set(recorded.withdrawn)
        return [
            name
            for name, version in self.current.items()
            if name not in names and (version.is_stored or name in withdrawn)
        ]

    def restore(self, adapter: RestoredAdapter) -> list[AdapterVersion]:
        """Make the versions of a stored adapter available, read on first use, unless they are; returns those that they
        replace."""
        if self._has(adapter):
            return []
        replaced = self.take(adapter.name)
        self.withdrawn.discard(adapter.name)
        current = self.current[adapter.name] = _stored_version(adapter.name, adapter.current)
        for stored, _ in adapter.shares:
            if stored.content_hash != current.content_hash:
                self.beside.keep(_stored_version(adapter.name, stored))
        self.beside.set(adapter.name, tuple((stored.content_hash, share) for stored, share in adapter.shares))
        return replaced

    def _has(self, adapter: RestoredAdapter) -> bool:
        current, beside = self.current.get(adapter.name), self.beside
        if current is None or current.files != stored_files(adapter.current):
            return False
        hashes = tuple((stored.content_hash, share) for stored, share in adapter.shares)
        others = [content_hash for content_hash, _ in hashes if content_hash != current.content_hash]
        are_known = all(beside.find(adapter.name, content_hash) is not None for content_hash in others)
        return are_known and beside.shares(adapter.name) == tuple(sorted(hashes))

    def withdraw(self, name: str) -> list[AdapterVersion]:
        """Remove a name; returns its versions. Its folder in --adapter-dir is not offered until it is loaded."""
        self.withdrawn.withdraw(name)
        return self.take(name)

    def take(self, name: str) -> list[AdapterVersion]:
        """Remove a name, which may be offered again; returns its versions."""
        current, beside = self.current.pop(name, None), self.beside.set(name, ())
        return beside if current is None else [current, *beside]

    def set_versions(self, name: str, current: str, shares: Shares) -> list[AdapterVersion] | None:
        """Set the versions of a name by their content hashes, "" for the current one; returns those that requests no
        longer get. None: one of them is not loaded, and nothing has changed."""
        old, beside = self.current.get(name), self.beside
        wanted = {content_hash for content_hash, _ in shares} | ({current} if current else set())
        known = set() if old is None else {old.content_hash}
        if any(content_hash not in known and beside.find(name, content_hash) is None for content_hash in wanted):
            return None
        replaced: list[AdapterVersion] = []
        chosen = beside.find(name, current)
        if chosen is not None and chosen is not old:
            beside.take(chosen)
            self.withdrawn.discard(name)
            self.current[name] = chosen
            if old is not None:
                chosen.totals, old.pinned = old.totals, False
                if beside.find(name, old.content_hash) is None:
                    beside.keep(old)
                else:  # a stored copy of the same content stays instead
                    replaced.append(old)
        return [*replaced, *beside.set(name, shares)]


def _stored_version(name: str, stored: StoredAdapter) -> AdapterVersion:
    """A version that is read on first use, and listed as it was when it was loaded."""
    return AdapterVersion(
        name=name,
        files=stored_files(stored),
        content_hash=stored.content_hash,
        num_bytes=stored.num_bytes,
        rank=stored.rank,
        invocation=stored.invocation,
    )
