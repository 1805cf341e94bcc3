"""An HTTP process's client of all engines of a server, which shows them as one.

Adapters change at all engines or none (`adapter_changes`). With one engine everything else is passed on. With several,
each request goes to the one that `routing` chooses, limits of keys are counted once (`key_counts`), and what engines
report is added up (`sums`). The end of an engine costs its own streams only; the server ends with the last of them.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from stellarbyte_server.client.delta_stream import DeltaStream
from stellarbyte_server.client.engine_client import DRAINING, EngineClient, EngineDead
from stellarbyte_server.client.launch import Engine, EngineStartError
from stellarbyte_server.client.progress import NO_STATS
from stellarbyte_server.client.replicas.adapter_changes import AdapterChanges
from stellarbyte_server.client.replicas.joined import JoinedEngines
from stellarbyte_server.client.replicas.key_counts import KeyCounts
from stellarbyte_server.client.replicas.prefixes import prefix_keys
from stellarbyte_server.client.replicas.replica import ReplicaRecord
from stellarbyte_server.client.replicas.routing import RequestFacts, choose
from stellarbyte_server.client.replicas.sums import merged_lists, sum_of_totals
from stellarbyte_server.client.restart import EngineEnded, EngineNews, EngineRestarted, serves_the_same
from stellarbyte_server.protocol.adapter_versions import (
    AdapterLocated,
    LocateAdapter,
    RecordedAdapters,
    SetVersions,
    StoredAdapter,
)
from stellarbyte_server.protocol.messages import (
    AdapterList,
    AdapterLoaded,
    AdapterUnloaded,
    EngineInfo,
    EngineStats,
    EngineTotals,
    KeyLimits,
    LoadAdapter,
)
from stellarbyte_server.protocol.request import QUEUE_FULL, SHUTTING_DOWN, GenerationRequest, RequestRejected

logger = logging.getLogger("server.replicas")

SYNC_AGAIN_S = 1.0
_OTHERS = "the replicas do not fit the same requests; give --max-model-len and --kv-cache-memory"


class Replicas:
    """The connection to all engines, on one event loop."""

    def __init__(
        self,
        engines: Sequence[Engine],
        folder: Path,
        on_news: Callable[[EngineNews], None] | None = None,
        past: Sequence[EngineTotals | None] = (),
    ) -> None:
        """Connect to at least one engine.

        Args:
            folder: private folder of the server, which all its HTTP processes share.
            past: the totals of each engine's earlier processes, of several engines.
        """
        self.dead = asyncio.Event()  # no engine is left, and none will follow
        self.folder = folder
        self._engines = engines
        self._on_news = on_news
        self._changes: AdapterChanges | None = None
        self._past: list[EngineTotals | None] = list(past) if past else [None for _ in engines]
        self._records = [ReplicaRecord(index) for index in range(len(engines))]
        for record, engine in zip(self._records, engines, strict=True):
            watch = record if len(engines) > 1 else None
            record.client = EngineClient(engine, self._hear, replica=record.index, watch=watch)
        self.clients = tuple(record.client for record in self._records)
        self._keys = KeyCounts(self.clients, lambda: [record.client for record in self._serving()])
        for record in self._records:
            record.keys = self._keys
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, recorded: Callable[[], RecordedAdapters] | None = None) -> EngineInfo:
        """Wait until all engines are ready; returns what each reports. Raises EngineStartError.

        `recorded` reads the record of adapters, which each engine gets; None: this process changes none, and engines
        keep theirs. Then `close` must be called.
        """
        infos = await self._start_clients()
        if not all(serves_the_same(infos[0], info) for info in infos):
            await self.close()
            raise EngineStartError(_OTHERS)
        for record in self._records:
            record.forget()
            record.note_process(self._engines[record.index].endpoint)
        if recorded is not None:
            endpoints = {record.index: record.endpoints for record in self._records}
            self._changes = AdapterChanges(self._connected, JoinedEngines(self.folder), endpoints, recorded)
        await asyncio.gather(*map(self._sync, self._records))
        return infos[0]

    @property
    def info(self) -> EngineInfo:
        """What each engine has reported, but with the blocks of all; once `start` has returned."""
        num_blocks = sum(client.info.num_blocks for client in self.clients)
        return msgspec.structs.replace(self.clients[0].info, num_blocks=num_blocks)

    async def _start_clients(self) -> list[EngineInfo]:
        starts = [asyncio.ensure_future(client.start()) for client in self.clients]
        try:
            return await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            outcomes = await asyncio.gather(*starts, return_exceptions=True)
            started = [c for c, out in zip(self.clients, outcomes, strict=True) if not isinstance(out, BaseException)]
            await asyncio.gather(*(client.close() for client in started))
            raise

    async def close(self) -> None:
        """Close the connections; open streams end with an error."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(client.close() for client in self.clients))

    # Requests

    async def submit(
        self,
        *requests: GenerationRequest,
        limits: KeyLimits | None = None,
        continues: bool = False,
        num_later_tokens: int = 0,
        arrived_s: float | None = None,
    ) -> list[DeltaStream]:
        """Submit requests to one engine; see `EngineClient.submit`. A full queue passes them on to the next."""
        if len(self.clients) == 1:
            if not self._records[0].is_in_step:
                raise EngineDead(self._why_none())
            return await self.clients[0].submit(
                *requests, limits=limits, continues=continues, num_later_tokens=num_later_tokens, arrived_s=arrived_s
            )
        if not (self.is_admitting or continues):
            raise RequestRejected(DRAINING, SHUTTING_DOWN)
        first = requests[0]
        facts = RequestFacts(adapters=first.adapter_names)
        salt = (first.cache_salt, str(first.adapter), first.adapter_scale)
        prefix = prefix_keys(first.prompt_token_ids, salt, self.info.block_size)
        candidates, full = self._serving(), None
        while candidates:
            record = candidates[choose(facts, [each.state(prefix) for each in candidates])]
            candidates.remove(record)
            if limits is not None and not continues:
                await self._keys.reserve(limits, requests, num_later_tokens)
            record.note_sent(requests, facts.adapters, prefix)
            try:
                if record.serves:  # still, after the reservation
                    return await record.client.submit(
                        *requests, limits=limits, continues=continues, arrived_s=arrived_s, is_reserved=True
                    )
            except BaseException as error:
                record.forget_requests(requests)
                if not (isinstance(error, RequestRejected) and error.code == QUEUE_FULL):
                    raise
                full = error
            else:
                record.forget_requests(requests)
            candidates = [each for each in candidates if each.serves]
        raise EngineDead(self._why_none()) if full is None else full

    def _serving(self) -> list[ReplicaRecord]:
        return [record for record in self._records if record.serves]

    def _connected(self) -> list[EngineClient]:
        return [client for client in self.clients if client.is_connected]

    def stop_admission(self) -> None:
        """Refuse new requests from now on; submitted ones continue."""
        for client in self.clients:
            client.stop_admission()

    @property
    def is_admitting(self) -> bool:
        return self.clients[0].is_admitting

    def end_streams(self, message: str) -> None:
        """Give every open stream an error as its last delta."""
        for client in self.clients:
            client.end_streams(message)

    async def charge(self, limits: KeyLimits) -> None:
        """Count a request that is not submitted against its key; RequestRejected or EngineDead."""
        if len(self.clients) == 1:
            await self.clients[0].charge(limits)
        else:
            await self._keys.charge(limits)

    # Adapters

    @property
    def changes(self) -> AdapterChanges:
        assert self._changes is not None, "`start` has got the record"
        return self._changes

    async def prepare_adapter(
        self, name: str, files: StoredAdapter, *, in_place: bool = True, pinned: bool = False, probe: bool = False
    ) -> AdapterLoaded:
        """Have all engines read a version beside the current one (see `LoadAdapter`); RequestRejected or EngineDead.

        After a failure, some may keep it until `set_versions`.
        """
        return await self.changes.prepare(LoadAdapter(secrets.token_hex(8), name, files, in_place, pinned, probe))

    async def locate_adapter(self, path: str) -> AdapterLocated:
        """The files of an adapter that may be loaded; RequestRejected or EngineDead."""
        serving = self._serving()
        call = LocateAdapter(secrets.token_hex(8), path)
        reply = await (serving[0].client if serving else self.clients[0]).call(call)
        assert isinstance(reply, AdapterLocated)
        return reply

    async def set_versions(
        self, name: str, current: str, shares: tuple[tuple[str, float], ...] = (), *, pinned: bool = False
    ) -> None:
        """Set the versions of an adapter that requests get (see `SetVersions`); RequestRejected or EngineDead."""
        call = SetVersions(secrets.token_hex(8), name, current, shares, pinned)
        await self.changes.set_versions(call)

    async def begin_unload(self, name: str) -> Awaitable[AdapterUnloaded]:
        """Unload an adapter: new requests do not get it. The result waits until its requests have ended.

        Both raise RequestRejected or EngineDead.
        """
        return await self.changes.begin_unload(name)

    async def list_adapters(self) -> AdapterList:
        """All adapters and their current state; EngineDead."""
        if len(self.clients) == 1:
            return await self.clients[0].list_adapters()
        healthy = [client for client in self.clients if client.health() is None]
        answers = await asyncio.gather(*(client.list_adapters() for client in healthy), return_exceptions=True)
        lists = [answer for answer in answers if isinstance(answer, AdapterList)]
        if not lists:
            raise EngineDead(self._why_none())
        return merged_lists(lists)

    # State of the whole

    @property
    def num_lost(self) -> int:
        """Engine processes that have ended."""
        return sum(client.num_lost for client in self.clients)

    def health(self) -> str | None:
        """None while an engine makes progress, else the problem in one sentence."""
        return None if self._serving() else self._why_none()

    def degradation(self) -> str | None:
        """None while all engines serve or none does, else one sentence."""
        serving = len(self._serving())
        return f"{serving} of {len(self.clients)} replicas serve." if 0 < serving < len(self.clients) else None

    def _why_none(self) -> str:
        reasons = [client.health() for client in self.clients]
        return next(
            (reason for reason in reasons if reason is not None), "The engine has ended, or is getting its adapters."
        )

    def note_rejected(self, reason: str) -> None:
        """Count a request that got an error; see `Observer.note_rejected`."""
        serving = self._serving()
        (serving[0].client if serving else self.clients[0]).observer.note_rejected(reason)

    def engine_stats(self) -> list[tuple[bool, EngineStats]]:
        """Of each engine whether it serves, and its newest statistics, which are at most about a second old."""
        return [
            (record.serves, record.client.stats if record.client.is_connected else NO_STATS) for record in self._records
        ]

    async def fresh_totals(self) -> EngineTotals | None:
        """The current totals over all engines and HTTP processes; see `EngineClient.fresh_totals`.

        Those of several engines include their earlier processes, so that no count falls when one is replaced.
        """
        if len(self.clients) == 1:
            return await self.clients[0].fresh_totals()
        fresh = await asyncio.gather(*(client.fresh_totals() for client in self.clients))
        running: list[EngineTotals] = []
        ended = [totals for totals in self._past if totals is not None]
        for client, totals in zip(self.clients, fresh, strict=True):
            if totals is not None:
                (running if client.is_connected else ended).append(totals)
        return sum_of_totals(running, ended) if running or ended else None

    @property
    def past(self) -> tuple[EngineTotals | None, ...]:
        """The totals of each engine's earlier processes, for another HTTP process that starts."""
        for record in self._records:
            if not record.client.is_connected:
                self._note_past(record)
        return tuple(self._past)

    # Engines that end and start

    def _hear(self, news: EngineNews) -> None:
        record = self._records[news.replica]
        if isinstance(news, EngineEnded):
            record.forget()
        elif isinstance(news, EngineRestarted):
            record.forget()  # again: the cache may have another size
            record.note_process(news.endpoint)
            if len(self.clients) > 1:
                self._note_past(record)
            syncing = asyncio.create_task(self._sync(record))
            self._tasks.add(syncing)
            syncing.add_done_callback(self._tasks.discard)
        else:
            record.is_gone = True
            left = sum(not each.is_gone for each in self._records)
            if left == 0:
                self.dead.set()
            else:
                logger.error(
                    "replica %d has ended; the server goes on with %d of %d", record.index, left, len(self.clients)
                )
        if self._on_news is not None:
            self._on_news(news)

    def _note_past(self, record: ReplicaRecord) -> None:
        """Keep the totals of a process that has ended."""
        before = [totals for totals in (self._past[record.index], record.client.totals) if totals is not None]
        if before:
            self._past[record.index] = sum_of_totals((), before)
        record.client.totals = None

    async def _sync(self, record: ReplicaRecord) -> None:
        """Have an engine do as the record of adapters says; from then on it gets requests."""
        endpoint = record.endpoint
        while record.endpoint == endpoint:
            try:
                if self._changes is not None:
                    await self._changes.sync(record.client, endpoint)
            except EngineDead:
                if not record.client.is_connected:
                    return  # another process follows, or none
                await asyncio.sleep(SYNC_AGAIN_S)  # it makes no progress now
                continue
            except Exception:
                logger.exception("engine %d did not get its adapters; trying again", record.index)
                await asyncio.sleep(SYNC_AGAIN_S)
                continue
            if record.endpoint == endpoint:  # otherwise another process, which gets them by a task of its own
                record.is_in_step = True
            return
