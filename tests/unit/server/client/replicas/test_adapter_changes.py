"""Changes of adapters over several engines, each a registry without files that fails when told to."""

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
from stellarbyte_server.client.replicas.joined import JoinedEngines
from stellarbyte_server.protocol.adapter_versions import (
    RecordedAdapters,
    RestoreAdapters,
    RestoredAdapter,
    SetVersions,
    StoredAdapter,
)
from stellarbyte_server.protocol.messages import AdapterLoaded, AdapterUnloaded, LoadAdapter, Reply, Settled
from stellarbyte_server.protocol.request import ADAPTER_FAILED, ADAPTER_NOT_FOUND, RequestRejected
from tests.support.stubs.adapter_cards import adapter_card as card


@dataclass
class FakeReplica:
    """The client of an engine whose adapters are hashes by name."""

    replica: int
    current: dict[str, str] = field(default_factory=dict)
    beside: dict[str, set[str]] = field(default_factory=dict)  # prepared versions that are not current
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
            content_hash = f"hash of {call.files.root}"
            self.beside.setdefault(call.name, set()).add(content_hash)
            return AdapterLoaded(call.call_id, card(call.name, content_hash=content_hash), (), ())
        if isinstance(call, SetVersions):
            self._set_versions(call)
        if isinstance(call, RestoreAdapters):
            self.current = {adapter.name: adapter.current.content_hash for adapter in call.recorded.adapters}
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
        if self.has_ended:
            raise EngineDead("The engine process ended.")
        if self.current.pop(name, None) is None:
            raise RequestRejected("There is none.", ADAPTER_NOT_FOUND)
        return AdapterUnloaded("", 10)


class Changes:
    """Changes of three engines, with a record that is a dictionary."""

    def __init__(self, folder: Path) -> None:
        self.replicas = [FakeReplica(index) for index in range(3)]
        self.endpoints = {replica.replica: {"first"} for replica in self.replicas}
        self.record: dict[str, str] = {}
        joined = JoinedEngines(folder)
        connected: Any = lambda: list(self.replicas)  # noqa: E731
        self.changes = AdapterChanges(connected, joined, self.endpoints, self._recorded)

    def _recorded(self) -> RecordedAdapters:
        adapters = (RestoredAdapter(name=name, current=stored(root)) for name, root in self.record.items())
        return RecordedAdapters(adapters=tuple(adapters))

    async def prepare(self, root: str, name: str = "x") -> AdapterLoaded:
        return await self.changes.prepare(LoadAdapter(secrets.token_hex(8), name, stored(root), True))

    async def set(self, root: str, name: str = "x") -> None:
        await self.changes.set_versions(SetVersions(secrets.token_hex(8), name, root and f"hash of {root}"))

    async def load(self, root: str, name: str = "x") -> None:
        """As the server does it, with an engine that joins meanwhile."""
        await self.prepare(root, name)
        self.record[name] = root
        while True:
            try:
                return await self.set(root, name)
            except RequestRejected:
                await self.prepare(root, name)

    async def unload(self, name: str = "x") -> AdapterUnloaded:
        self.record.pop(name, None)
        return await (await self.changes.begin_unload(name))

    async def sync(self, replica: int, endpoint: str = "first") -> None:
        client: Any = self.replicas[replica]
        await self.changes.sync(client, endpoint)

    @property
    def current(self) -> list[dict[str, str]]:
        return [replica.current for replica in self.replicas]


def stored(root: str) -> StoredAdapter:
    return StoredAdapter(folder="", root=root, content_hash=f"hash of {root}")


def using(folder: Path, use: Callable[[Changes], Awaitable[None]]) -> None:
    async def run() -> None:
        await use(Changes(folder))

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_version_serves_when_all_have_read_it(tmp_path: Path) -> None:
    async def use(all: Changes) -> None:
        for root, before in (("a", {}), ("b", {"x": "hash of a"})):
            assert (await all.prepare(root)).card.content_hash == f"hash of {root}"
            assert all.current == [before] * 3
            await all.set(root)
            assert all.current == [{"x": f"hash of {root}"}] * 3
        assert not any(replica.beside for replica in all.replicas)
        assert (await all.unload()).num_bytes == 30
        assert all.current == [{}] * 3
        with pytest.raises(RequestRejected, match="There is none"):
            await all.unload()

    using(tmp_path, use)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("how", ["refused", "ended", "stalled"])
def test_if_one_fails_none_changes_and_it_is_named(tmp_path: Path, which: int, how: str) -> None:
    async def use(all: Changes) -> None:
        await all.load("before")
        broken = all.replicas[which]
        if how == "refused":
            broken.fails = RequestRejected("The file is torn.", ADAPTER_FAILED)
        elif how == "ended":
            broken.fails = EngineDead("The engine process ended.")
        else:
            broken.is_stalled = True
        with pytest.raises(RequestRejected if how == "refused" else EngineDead, match=f"Replica {which} .*no replica"):
            await all.prepare("a")
        broken.is_stalled = False
        await all.set("before")
        assert [(replica.current, replica.beside) for replica in all.replicas] == [({"x": "hash of before"}, {})] * 3

    using(tmp_path, use)


def test_what_fails_alike_everywhere_is_said_as_by_one(tmp_path: Path) -> None:
    async def use(all: Changes) -> None:
        for replica in all.replicas:
            replica.fails = RequestRejected("The file is torn.", ADAPTER_FAILED)
        with pytest.raises(RequestRejected, match=r"^The file is torn\.$"):
            await all.prepare("a")
        all.replicas.clear()
        with pytest.raises(EngineDead, match="No engine takes requests"):
            await all.prepare("a")

    using(tmp_path, use)


def test_a_new_process_gets_the_record_and_one_of_an_earlier_record_is_refused(tmp_path: Path) -> None:
    async def use(all: Changes) -> None:
        for name, root in (("x", "a"), ("y", "b"), ("old", "c")):
            await all.load(root, name)
        await all.unload("old")
        all.replicas[1] = FakeReplica(1, {"y": "hash of another", "old": "hash of c"})  # started before
        await all.sync(1)
        assert all.current == [{"x": "hash of a", "y": "hash of b"}] * 3
        await all.prepare("d")
        all.replicas[2] = FakeReplica(2)
        await all.sync(2)
        with pytest.raises(RequestRejected, match="no such version"):
            await all.set("d")
        await all.load("d")
        assert all.current == [{"x": "hash of d", "y": "hash of b"}] * 3

    using(tmp_path, use)


def test_an_engine_that_ends_does_not_stop_a_change_and_the_end_of_all_does(tmp_path: Path) -> None:
    async def use(all: Changes) -> None:
        await all.prepare("a")
        all.replicas[2].has_ended = True
        await all.set("a")
        assert all.current == [{"x": "hash of a"}] * 2 + [{}]
        assert (await all.unload()).num_bytes == 20
        for replica in all.replicas:
            replica.has_ended = True
        for change in (all.set("a"), all.unload()):
            with pytest.raises(EngineDead):
                await change

    using(tmp_path, use)


def test_changes_at_once_with_engines_that_start_leave_all_with_the_record(tmp_path: Path) -> None:
    """Also where the caller leaves in the middle of a change."""

    async def use(all: Changes) -> None:
        chance = random.Random(1)
        locks = {name: asyncio.Lock() for name in "xyz"}

        async def change() -> None:
            name = chance.choice("xyz")
            async with locks[name]:  # as the server holds
                try:
                    await (all.unload(name) if chance.random() < 0.3 else all.load(chance.choice("abc"), name))
                except RequestRejected:
                    pass

        async def start(index: int) -> None:
            all.replicas[index] = FakeReplica(index, {"x": "hash of a", "y": "hash of b"})
            await all.sync(index)

        for number in range(30):
            tasks = [asyncio.create_task(change()) for _ in range(6)]
            await asyncio.sleep(chance.random() * 0.02)
            await start(number % 3)
            await asyncio.gather(*tasks, return_exceptions=True)
            while all.changes._running:
                await asyncio.sleep(0.01)
            assert all.current == [{name: f"hash of {root}" for name, root in all.record.items()}] * 3

    using(tmp_path, use)


def test_a_change_goes_on_if_its_caller_leaves(tmp_path: Path) -> None:
    async def use(all: Changes) -> None:
        await all.prepare("a")
        setting = asyncio.create_task(all.set("a"))
        await asyncio.sleep(0)
        setting.cancel()
        await asyncio.gather(setting, return_exceptions=True)
        while all.changes._running:
            await asyncio.sleep(0.01)
        assert all.current == [{"x": "hash of a"}] * 3

    using(tmp_path, use)


def test_a_change_waits_for_the_news_of_a_process_that_others_know(tmp_path: Path) -> None:
    async def use(all: Changes) -> None:
        await all.sync(1, "second")  # by another HTTP process
        new, all.replicas[1:2] = all.replicas[1], []  # this one has heard of its end only
        await all.prepare("a")
        setting = asyncio.create_task(all.set("a"))
        await asyncio.sleep(0.2)
        assert not setting.done() and all.replicas[0].current == {}
        await new.call(LoadAdapter("", "x", stored("a"), True))
        all.replicas.append(new)
        all.endpoints[1].add("second")
        await setting
        assert all.current == [{"x": "hash of a"}] * 3

    using(tmp_path, use)
