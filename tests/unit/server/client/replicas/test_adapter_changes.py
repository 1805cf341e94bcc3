"""Loads and unloads over several replicas, each a registry without files that fails when told to."""

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from stellarbyte_server.client.engine_client import EngineDead
from stellarbyte_server.client.replicas.adapter_changes import AdapterChanges
from stellarbyte_server.client.replicas.journal import AdapterJournal, JournalEntry
from stellarbyte_server.protocol.adapter_versions import RestoreAdapters, RestoredAdapter, SetVersions, StoredAdapter
from stellarbyte_server.protocol.histogram import Buckets
from stellarbyte_server.protocol.messages import (
    AdapterCard,
    AdapterList,
    AdapterLoaded,
    AdapterUnloaded,
    CommitAdapter,
    DiscardAdapter,
    LoadAdapter,
    Reply,
    Settled,
)
from stellarbyte_server.protocol.request import ADAPTER_FAILED, ADAPTER_NOT_FOUND, RequestRejected
from tests.support.stubs.adapter_cards import adapter_card as card


@dataclass
class FakeReplica:
    """The client of an engine whose adapters are hashes by name."""

    replica: int
    current: dict[str, str] = field(default_factory=dict)
    held: dict[str, tuple[str, str]] = field(default_factory=dict)
    beside: dict[str, set[str]] = field(default_factory=dict)  # stored versions that are not current
    contents: dict[str, str] = field(default_factory=dict)  # by path, where they are not "hash of PATH"
    fails: Exception | None = None  # of loads
    is_stalled: bool = False
    has_ended: bool = False  # once all have read a version

    def health(self) -> str | None:
        return "it is stalled" if self.is_stalled else None

    async def call(self, call: Any) -> Reply:
        await asyncio.sleep(0)
        if self.is_stalled:
            await asyncio.Event().wait()
        if isinstance(call, LoadAdapter):
            if self.fails is not None:
                raise self.fails
            path = call.path.root if isinstance(call.path, StoredAdapter) else call.path
            content_hash = self.contents.get(path, f"hash of {path}")
            if call.is_beside:
                self.beside.setdefault(call.name, set()).add(content_hash)
                return AdapterLoaded(call.call_id, self._card(call.name, content_hash), (), ())
            self.held[call.call_id] = (call.name, content_hash)
            return AdapterLoaded(call.call_id, self._card(call.name, content_hash), (), ())
        if isinstance(call, CommitAdapter):
            name, content_hash = self.held.pop(call.held_id)
            self.current[name] = content_hash
            return AdapterLoaded(call.call_id, self._card(name, content_hash), (), ())
        if isinstance(call, DiscardAdapter):
            self.held.pop(call.held_id, None)
        if isinstance(call, SetVersions):
            self._set_versions(call)
        if isinstance(call, RestoreAdapters):
            self.current |= {adapter.name: adapter.current.content_hash for adapter in call.adapters}
        return Settled(call.call_id)

    def _set_versions(self, call: SetVersions) -> None:
        if self.has_ended:
            raise EngineDead("The engine process ended.")
        if call.current and call.current not in {self.current.get(call.name), *self.beside.get(call.name, ())}:
            raise RequestRejected("It has no such version loaded.", ADAPTER_NOT_FOUND)
        if call.current:
            self.current[call.name] = call.current
        self.beside.pop(call.name, None)

    async def unload_adapter(self, name: str) -> AdapterUnloaded:
        if self.current.pop(name, None) is None:
            raise RequestRejected("There is none.", ADAPTER_NOT_FOUND)
        return AdapterUnloaded("", 10)

    async def list_adapters(self) -> AdapterList:
        cards = tuple(self._card(name, content_hash) for name, content_hash in self.current.items())
        return AdapterList("", cards, Buckets(bounds=(), counts=(0,)), 1)

    def _card(self, name: str, content_hash: str) -> AdapterCard:
        return card(name, content_hash=content_hash)


async def load(changes: AdapterChanges, name: str, path: str, in_place: bool) -> AdapterLoaded:
    return await changes.load(LoadAdapter(secrets.token_hex(8), name, path, in_place), path)


async def unload(changes: AdapterChanges, name: str) -> AdapterUnloaded:
    return await (await changes.begin_unload(name))


def stored(root: str, name: str = "x") -> RestoredAdapter:
    return RestoredAdapter(name=name, current=StoredAdapter(folder="", root=root, content_hash=f"hash of {root}"))


async def load_beside(changes: AdapterChanges, root: str) -> AdapterLoaded:
    call = LoadAdapter(secrets.token_hex(8), "x", StoredAdapter(folder="", root=root), True, is_beside=True)
    return await changes.load_beside(call)


def with_replicas(
    folder: Path,
    use: Callable[[AdapterChanges, list[FakeReplica]], Awaitable[None]],
    on_disk: Callable[[], tuple[RestoredAdapter, ...]] = tuple,
) -> None:
    async def run() -> None:
        replicas = [FakeReplica(index) for index in range(3)]
        known = {replica.replica: {"first"} for replica in replicas}
        changes = AdapterChanges(lambda: list(replicas), AdapterJournal(folder), known, on_disk)  # type: ignore[arg-type]
        await use(changes, replicas)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_load_reaches_all(tmp_path: Path) -> None:
    async def use(changes: AdapterChanges, replicas: list[FakeReplica]) -> None:
        loaded = await load(changes, "x", "a", False)
        assert loaded.card.content_hash == "hash of a"
        assert [replica.current for replica in replicas] == [{"x": "hash of a"}] * 3
        assert AdapterJournal(tmp_path).read() == {"x": JournalEntry("a", "hash of a")}
        assert (await unload(changes, "x")).num_bytes == 30
        assert [replica.current for replica in replicas] == [{}] * 3
        assert AdapterJournal(tmp_path).read() == {"x": JournalEntry()}
        with pytest.raises(RequestRejected, match="There is none"):
            await unload(changes, "x")

    with_replicas(tmp_path, use)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("how", ["refused", "ended", "stalled", "other content"])
def test_if_one_fails_none_changes_and_it_is_named(tmp_path: Path, which: int, how: str) -> None:
    async def use(changes: AdapterChanges, replicas: list[FakeReplica]) -> None:
        await load(changes, "x", "before", False)
        broken = replicas[which]
        if how == "refused":
            broken.fails = RequestRejected("The file is torn.", ADAPTER_FAILED)
        elif how == "ended":
            broken.fails = EngineDead("The engine process ended.")
        elif how == "stalled":
            broken.is_stalled = True
        else:
            broken.contents["a"] = "another hash"
        refused = {"refused": RequestRejected, "other content": RequestRejected}.get(how, EngineDead)
        says = "changed while the replicas read them" if how == "other content" else f"Replica {which} .*no replica has"
        with pytest.raises(refused, match=says):
            await load(changes, "x", "a", True)
        assert [(replica.current, replica.held) for replica in replicas] == [({"x": "hash of before"}, {})] * 3
        assert AdapterJournal(tmp_path).read() == {"x": JournalEntry("before", "hash of before")}

    with_replicas(tmp_path, use)


def test_what_fails_alike_everywhere_is_said_as_by_one(tmp_path: Path) -> None:
    async def use(changes: AdapterChanges, replicas: list[FakeReplica]) -> None:
        for replica in replicas:
            replica.fails = RequestRejected("The file is torn.", ADAPTER_FAILED)
        with pytest.raises(RequestRejected, match=r"^The file is torn\.$"):
            await load(changes, "x", "a", True)

    with_replicas(tmp_path, use)


def test_a_new_process_gets_what_the_others_have(tmp_path: Path) -> None:
    async def use(changes: AdapterChanges, replicas: list[FakeReplica]) -> None:
        for name, path in (("x", "a"), ("y", "b"), ("z", "c"), ("old", "d")):
            await load(changes, name, path, False)
        await unload(changes, "old")
        new = replicas[1]
        new.current = {"y": "hash of another", "old": "hash of d", "of a folder": ""}
        new.contents["c"] = "changed since"
        await changes.sync(new, "first")  # type: ignore[arg-type]
        assert new.current == {"x": "hash of a", "y": "hash of b", "of a folder": ""} and new.held == {}
        assert changes.missing == {1: {"z"}}
        await load(changes, "z", "b", True)
        assert changes.missing == {1: set()} and new.current["z"] == "hash of b"
        replicas[0].current["old"] = new.current["old"] = ""  # a folder that came after the unloading
        await changes.sync(new, "first")  # type: ignore[arg-type]
        assert "old" in new.current

    with_replicas(tmp_path, use)


def test_changes_at_once_leave_all_replicas_with_the_same(tmp_path: Path) -> None:
    """Also where the caller leaves in the middle of a change."""

    async def use(changes: AdapterChanges, replicas: list[FakeReplica]) -> None:
        chance = random.Random(1)

        async def change() -> None:
            name = chance.choice("xy")
            try:
                if chance.random() < 0.3:
                    await unload(changes, name)
                else:
                    await load(changes, name, chance.choice("abc"), True)
            except RequestRejected:
                pass

        for _ in range(10):
            tasks = [asyncio.create_task(change()) for _ in range(6)]
            await asyncio.sleep(chance.random() * 0.03)
            chance.choice(tasks).cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            while changes._running:
                await asyncio.sleep(0.01)
            assert replicas[0].current == replicas[1].current == replicas[2].current
            assert not any(replica.held for replica in replicas)
            entries = AdapterJournal(tmp_path).read().items()
            assert {name: e.content_hash for name, e in entries if e.content_hash} == replicas[0].current

    with_replicas(tmp_path, use)


def test_a_change_waits_for_the_news_of_a_process_that_others_know(tmp_path: Path) -> None:
    async def use(changes: AdapterChanges, replicas: list[FakeReplica]) -> None:
        await changes.sync(replicas[1], "second")  # type: ignore[arg-type]  # by another HTTP process
        new, replicas[1:2] = replicas[1], []  # this one has heard of its end only
        loading = asyncio.create_task(load(changes, "x", "a", False))
        await asyncio.sleep(0.2)
        assert not loading.done() and replicas[0].current == {}
        replicas.append(new)
        changes._endpoints[1].add("second")  # type: ignore[attr-defined]
        await loading
        assert [replica.current for replica in replicas] == [{"x": "hash of a"}] * 3

    with_replicas(tmp_path, use)


def test_a_stored_version_serves_when_all_have_read_it(tmp_path: Path) -> None:
    async def use(changes: AdapterChanges, replicas: list[FakeReplica]) -> None:
        for root in ("a", "b"):
            loaded = await load_beside(changes, root)
            assert loaded.card.content_hash == f"hash of {root}"
            assert {replica.current.get("x") for replica in replicas} == ({None} if root == "a" else {"hash of a"})
            await changes.set_versions(SetVersions("set", "x", f"hash of {root}"))
            assert [(replica.current, replica.beside) for replica in replicas] == [({"x": f"hash of {root}"}, {})] * 3
        replicas[1].fails = RequestRejected("The disk is full.", ADAPTER_FAILED)
        with pytest.raises(RequestRejected, match=r"Replica 1 .*no replica has: The disk is full\."):
            await load_beside(changes, "c")
        await changes.set_versions(SetVersions("set", "x", "hash of b"))
        assert [(replica.current, replica.beside) for replica in replicas] == [({"x": "hash of b"}, {})] * 3
        assert AdapterJournal(tmp_path).read() == {}, "the record on the disk says it"

    with_replicas(tmp_path, use)


def test_an_engine_that_ends_does_not_stop_a_stored_version_and_one_that_lacks_it_does(tmp_path: Path) -> None:
    async def use(changes: AdapterChanges, replicas: list[FakeReplica]) -> None:
        await load_beside(changes, "a")
        replicas[2].has_ended = True
        await changes.set_versions(SetVersions("set", "x", "hash of a"))
        assert [replica.current for replica in replicas] == [{"x": "hash of a"}] * 2 + [{}]
        replicas[2] = FakeReplica(2)  # started with an earlier record
        with pytest.raises(RequestRejected, match="no such version"):
            await changes.set_versions(SetVersions("set", "x", "hash of a"))
        for replica in replicas:
            replica.has_ended = True
        with pytest.raises(EngineDead):
            await changes.set_versions(SetVersions("set", "x", "hash of a"))

    with_replicas(tmp_path, use)


def test_a_new_process_gets_what_the_disk_says_before_what_the_journal_says(tmp_path: Path) -> None:
    on_disk = [stored("a", "x")]

    async def use(changes: AdapterChanges, replicas: list[FakeReplica]) -> None:
        await load_beside(changes, "a")
        await changes.set_versions(SetVersions("set", "x", "hash of a"))
        await unload(changes, "x")
        assert AdapterJournal(tmp_path).read() == {"x": JournalEntry()}
        new = replicas[1]
        on_disk.clear()
        new.current = {"x": "hash of a"}  # as the disk said when it started
        await changes.sync(new, "first")  # type: ignore[arg-type]
        assert new.current == {}
        on_disk.append(stored("b", "x"))  # loaded again: the record is written, then requests get it
        await changes.sync(new, "first")  # type: ignore[arg-type]
        assert new.current == {"x": "hash of b"}
        await load_beside(changes, "b")
        await changes.set_versions(SetVersions("set", "x", "hash of b"))
        assert [replica.current for replica in replicas] == [{"x": "hash of b"}] * 3
        assert AdapterJournal(tmp_path).read() == {}

    with_replicas(tmp_path, use, lambda: tuple(on_disk))
