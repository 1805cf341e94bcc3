"""Loads and unloads of adapters at all replicas or none.

A load has two phases: every replica reads and checks the files and holds the adapter; when all have succeeded with the
same content, all make it current. An unload cannot fail where the name is known. A replica whose process was replaced
gets what the journal says before it takes requests.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from typing import TypeVar

from stellarbyte_server.client.engine_client import EngineClient, EngineDead
from stellarbyte_server.client.replicas.journal import AdapterJournal, JournalEntry
from stellarbyte_server.protocol.messages import (
    AdapterCard,
    AdapterLoaded,
    AdapterUnloaded,
    Call,
    CommitAdapter,
    DiscardAdapter,
    LoadAdapter,
    Reply,
    Settle,
)
from stellarbyte_server.protocol.request import ADAPTER_LOADING, ADAPTER_NOT_FOUND, RequestRejected

logger = logging.getLogger("server.replicas")

T = TypeVar("T")
LOADING_ELSEWHERE_S = 5.0  # after which an engine has noticed the end of an HTTP process
NEWS_LIMIT_S = 10.0
_RETRY_S = 0.1
_LOOK_S = 0.5  # between looks at an engine's health


class AdapterChanges:
    """Changes of the adapters of several engines, from one of the HTTP processes."""

    def __init__(
        self,
        connected: Callable[[], list[EngineClient]],
        journal: AdapterJournal,
        endpoints: Mapping[int, Container[str]],
    ) -> None:
        """Changes of these engines.

        Args:
            connected: the clients of the engines that take messages.
            endpoints: of each replica's processes that this process has heard of.
        """
        self._connected = connected
        self._endpoints = endpoints
        self._journal = journal
        self._running: set[asyncio.Task[object]] = set()
        self.missing: dict[int, set[str]] = {}  # by replica, adapters of which it could not get the others' content

    async def load(self, name: str, path: str, in_place: bool, pinned: bool | None = None) -> AdapterLoaded:
        """Load an adapter at all replicas; RequestRejected or EngineDead, and then no replica has changed."""
        return await self._to_its_end(self._load(LoadAdapter(_new_id(), name, path, in_place, pinned, is_held=True)))

    async def unload(self, name: str) -> AdapterUnloaded:
        """Unload an adapter at all replicas, and wait until its requests have ended; RequestRejected or EngineDead."""
        unloading, refused = await self._to_its_end(self._withdraw(name))
        answers = await asyncio.gather(*unloading, return_exceptions=True)
        freed = [answer.num_bytes for answer in answers if isinstance(answer, AdapterUnloaded)]
        if not freed:
            raise _whole_failure([*answers, *refused])
        return AdapterUnloaded("", sum(freed))

    async def sync(self, client: EngineClient, endpoint: str) -> None:
        """Give a replica's process the adapters that the others have; EngineDead."""
        await self._to_its_end(self._sync(client, endpoint))

    async def _to_its_end(self, change: Awaitable[T]) -> T:
        """A change, which goes on if the caller is cancelled."""
        task = asyncio.ensure_future(change)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def _load(self, load: LoadAdapter) -> AdapterLoaded:
        name = load.name
        async with self._journal.locked():
            await self._until_all_are_known()
            clients = self._connected()
            card = await self._hold(clients, load)
            entry = JournalEntry(load.path, card.content_hash, card.pinned)
            await asyncio.to_thread(self._journal.note, name, entry)
            answers = await _at_all(clients, lambda client: _answer(client, CommitAdapter(_new_id(), load.call_id)))
            for names in self.missing.values():
                names.discard(name)
            for client, answer in zip(clients, answers, strict=True):
                if isinstance(answer, RequestRejected):
                    logger.error("replica %d has not changed to the adapter %s: %s", client.replica, name, answer)
            loaded = [answer for answer in answers if isinstance(answer, AdapterLoaded)]
            if not loaded:
                raise _whole_failure(answers)
            return loaded[0]

    async def _hold(self, clients: Sequence[EngineClient], load: LoadAdapter) -> AdapterCard:
        """Let all clients' engines hold an adapter; returns its card. If one fails, none does."""
        answers = await _at_all(clients, lambda client: _answer(client, load))
        failure = _first_failure(clients, answers)
        cards = [answer.card for answer in answers if isinstance(answer, AdapterLoaded)]
        if failure is None and len({card.content_hash for card in cards}) > 1:
            message = (
                f"The files of the adapter {load.name!r:.200} changed while the replicas read them; load it again."
            )
            failure = RequestRejected(message, param="lora_path")
        if failure is not None:
            await _at_all(clients, lambda client: _answer(client, DiscardAdapter(_new_id(), load.call_id)))
            raise failure
        return cards[0]

    async def _withdraw(
        self, name: str
    ) -> tuple[list["asyncio.Task[Reply | BaseException]"], list[Reply | BaseException]]:
        """Unload an adapter everywhere. Returns the calls, which end with its last requests, and refusals of others.

        RequestRejected or EngineDead if it is unloaded nowhere.
        """
        async with self._journal.locked():
            await self._until_all_are_known()
            clients, refused = self._connected(), []
            unloading: list[asyncio.Task[Reply | BaseException]] = []
            for _ in range(int(LOADING_ELSEWHERE_S / _RETRY_S)):
                calls = [asyncio.create_task(_outcome(client.unload_adapter(name))) for client in clients]
                await _at_all(clients, lambda client: _answer(client, Settle(_new_id())))
                await asyncio.sleep(0)
                outcomes = [call.result() if call.done() else None for call in calls]
                unloading += [call for call, outcome in zip(calls, outcomes, strict=True) if not _is_failure(outcome)]
                refused += [outcome for outcome in outcomes if _is_failure(outcome)]
                clients = [
                    client
                    for client, outcome in zip(clients, outcomes, strict=True)
                    if isinstance(outcome, RequestRejected) and outcome.code == ADAPTER_LOADING
                ]
                if not (clients and unloading):
                    break
                await asyncio.sleep(_RETRY_S)
            if not unloading:
                raise _whole_failure(refused)
            await asyncio.to_thread(self._journal.note, name, JournalEntry())
            for names in self.missing.values():
                names.discard(name)
            return unloading, [failure for failure in refused if failure is not None]

    async def _until_all_are_known(self) -> None:
        """Wait for the news of processes that get requests from other HTTP processes already, or they would miss this
        change."""
        deadline_s = time.monotonic() + NEWS_LIMIT_S
        joined = await asyncio.to_thread(self._journal.joined)
        while any(endpoint not in self._endpoints[replica] for replica, endpoint in joined.items()):
            if time.monotonic() > deadline_s:
                raise EngineDead("This HTTP process has not heard of a replica that has started; try again.")
            await asyncio.sleep(_LOOK_S / 10)

    async def _sync(self, client: EngineClient, endpoint: str) -> None:
        async with self._journal.locked():
            await self._give(client, await asyncio.to_thread(self._journal.read))
            await asyncio.to_thread(self._journal.note_joined, client.replica, endpoint)

    async def _give(self, client: EngineClient, entries: Mapping[str, JournalEntry]) -> None:
        if entries:
            cards = {card.name: card for card in (await client.list_adapters()).cards if card.is_current}
            missing = self.missing[client.replica] = set()
            for name, entry in entries.items():
                card = cards.get(name)
                if entry.content_hash and (card is None or card.content_hash != entry.content_hash):
                    if not await self._load_same(client, name, entry):
                        missing.add(name)
                elif not entry.content_hash and card is not None and not await self._others_offer(client, name):
                    await _unload_quietly(client, name)

    async def _load_same(self, client: EngineClient, name: str, entry: JournalEntry) -> bool:
        """Load the content that the other replicas have; returns whether its files still hold it. EngineDead."""
        why = "its files have changed"
        try:
            load = LoadAdapter(_new_id(), name, entry.path, True, entry.pinned, is_held=True)
            card = await self._hold([client], load)
            if card.content_hash == entry.content_hash:
                await _answer(client, CommitAdapter(_new_id(), load.call_id))
                return True
            await _answer(client, DiscardAdapter(_new_id(), load.call_id))
        except RequestRejected as refusal:
            why = str(refusal)
        logger.error(
            "replica %d does not get the adapter %s that the others have, so they get its requests: %s",
            client.replica,
            name,
            why,
        )
        await _unload_quietly(client, name)
        return False

    async def _others_offer(self, client: EngineClient, name: str) -> bool:
        """Whether another replica offers a name that was unloaded: as a folder of --adapter-dir that came later."""
        others = [other for other in self._connected() if other is not client]
        for answer in await _at_all(others, lambda other: other.list_adapters()):
            if not isinstance(answer, BaseException):
                return any(card.name == name and card.is_current for card in answer.cards)
        return False


def _new_id() -> str:
    return secrets.token_hex(8)


async def _answer(client: EngineClient, call: Call) -> Reply:
    """The answer to a call; EngineDead also if the engine stalls, so that one engine does not hold up the others."""
    answering = asyncio.ensure_future(client.call(call))
    while not (await asyncio.wait({answering}, timeout=_LOOK_S))[0]:
        if (why := client.health()) is not None:
            answering.cancel()
            raise EngineDead(why)
    return answering.result()


async def _at_all(
    clients: Sequence[EngineClient], call: Callable[[EngineClient], Awaitable[T]]
) -> list[T | BaseException]:
    return await asyncio.gather(*map(call, clients), return_exceptions=True)


async def _outcome(call: Awaitable[AdapterUnloaded]) -> Reply | BaseException:
    """The answer to a call, or how it failed."""
    try:
        return await call
    except (RequestRejected, EngineDead) as error:
        return error


async def _unload_quietly(client: EngineClient, name: str) -> None:
    """Unload an adapter of a replica that has no requests yet, if it has it; EngineDead."""
    try:
        await client.unload_adapter(name)
    except RequestRejected as refusal:
        if refusal.code != ADAPTER_NOT_FOUND:
            logger.error("replica %d could not unload the adapter %s: %s", client.replica, name, refusal)


def _is_failure(outcome: object) -> bool:
    return isinstance(outcome, BaseException)


def _first_failure(clients: Sequence[EngineClient], answers: Sequence[object]) -> Exception | None:
    """Why not all replicas have succeeded, which names the one that failed unless all failed alike."""
    failed = [(c, a) for c, a in zip(clients, answers, strict=True) if isinstance(a, BaseException)]
    if len(failed) == len(answers):
        return _whole_failure(answers)
    for client, failure in failed:
        nothing = f"Replica {client.replica}"
        if isinstance(failure, RequestRejected):
            message = f"{nothing} could not load the adapter, so no replica has: {failure}"
            return RequestRejected(message, failure.code, failure.param, failure.retry_after_s)
        if isinstance(failure, EngineDead):
            return EngineDead(f"{nothing} ended while it loaded the adapter, so no replica has.")
        raise failure
    return None


def _whole_failure(answers: Sequence[object]) -> Exception:
    """Why no replica has succeeded: the reason of one that refused, rather than of one that has ended."""
    refused = [answer for answer in answers if isinstance(answer, RequestRejected)]
    for answer in (*refused, *answers):
        if isinstance(answer, Exception):
            return answer
    return EngineDead("No replica takes requests.")
