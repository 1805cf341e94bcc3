"""Changes of adapters at all engines or none.

Every engine reads and checks a version beside the current one; the caller then writes the record, which decides; then
all engines change what requests get. An engine whose process was replaced gets the record before it takes requests, so
that a change is whole wherever processes end.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from typing import TypeVar

import msgspec

from stellarbyte_server.client.engine_client import EngineClient, EngineDead
from stellarbyte_server.client.replicas.joined import JoinedEngines
from stellarbyte_server.protocol.adapter_versions import RecordedAdapters, RestoreAdapters, SetVersions
from stellarbyte_server.protocol.messages import AdapterLoaded, AdapterUnloaded, Call, LoadAdapter, Reply, Settle
from stellarbyte_server.protocol.request import RequestRejected

T = TypeVar("T")
NEWS_LIMIT_S = 10.0
_LOOK_S = 0.5  # between looks at an engine's health


class AdapterChanges:
    """Changes of the adapters of a server's engines, from one of the HTTP processes."""

    def __init__(
        self,
        connected: Callable[[], list[EngineClient]],
        joined: JoinedEngines,
        endpoints: Mapping[int, Container[str]],
        recorded: Callable[[], RecordedAdapters],
    ) -> None:
        """Changes of these engines.

        Args:
            connected: the clients of the engines that take messages.
            endpoints: of each replica's processes that this process has heard of.
            recorded: reads the record.
        """
        self._connected = connected
        self._joined = joined
        self._endpoints = endpoints
        self._recorded = recorded
        self._running: set[asyncio.Task[object]] = set()

    async def prepare(self, load: LoadAdapter) -> AdapterLoaded:
        """Have all engines read and check a version beside the current one.

        RequestRejected or EngineDead, and then some may keep it until `set_versions`.
        """
        return await self._to_its_end(self._prepare(load))

    async def set_versions(self, call: SetVersions) -> None:
        """Set the versions that requests get at all engines; one whose process ends meanwhile gets the record.

        RequestRejected or EngineDead if some have not changed.
        """
        await self._to_its_end(self._set_versions(call))

    async def begin_unload(self, name: str) -> Awaitable[AdapterUnloaded]:
        """Unload an adapter at all engines. The result waits until its requests have ended.

        Both raise RequestRejected or EngineDead.
        """
        return asyncio.ensure_future(_unloaded(*await self._to_its_end(self._withdraw(name))))

    async def sync(self, client: EngineClient, endpoint: str) -> None:
        """Have an engine process do as the record says; EngineDead."""
        await self._to_its_end(self._sync(client, endpoint))

    async def _to_its_end(self, change: Awaitable[T]) -> T:
        """A change, which goes on if the caller is cancelled."""
        task = asyncio.ensure_future(change)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def _prepare(self, load: LoadAdapter) -> AdapterLoaded:
        """An engine that joins meanwhile lacks the version, so `_set_versions` is refused, and prepared again."""
        clients = self._connected()
        answers = await _at_all(clients, lambda client: _answer(client, load))
        if (failure := _first_failure(clients, answers)) is not None:
            raise failure
        loaded = [answer for answer in answers if isinstance(answer, AdapterLoaded)]
        probe = next((each.probe for each in loaded if each.probe is not None), None)
        return msgspec.structs.replace(loaded[0], probe=probe, is_used=any(each.is_used for each in loaded))

    async def _set_versions(self, call: SetVersions) -> None:
        async with self._joined.locked():
            await self._until_all_are_known()
            answers = await _at_all(self._connected(), lambda client: _answer(client, call))
            if any(isinstance(answer, RequestRejected) for answer in answers) or all(map(_is_failure, answers)):
                raise _whole_failure(answers)

    async def _withdraw(
        self, name: str
    ) -> tuple[list["asyncio.Task[Reply | BaseException]"], list[Reply | BaseException]]:
        """Unload an adapter everywhere. Returns the calls, which end with its last requests, and refusals of others.

        RequestRejected or EngineDead if it is unloaded nowhere.
        """
        async with self._joined.locked():
            await self._until_all_are_known()
            clients = self._connected()
            calls = [asyncio.create_task(_outcome(client.unload_adapter(name))) for client in clients]
            await _at_all(clients, lambda client: _answer(client, Settle(_new_id())))
            await asyncio.sleep(0)
            refused = [call.result() for call in calls if call.done() and _is_failure(call.result())]
            unloading = [call for call in calls if not (call.done() and _is_failure(call.result()))]
            if not unloading:
                raise _whole_failure(refused)
            return unloading, refused

    async def _until_all_are_known(self) -> None:
        """Wait for the news of processes that get requests from other HTTP processes already, or they would miss this
        change."""
        deadline_s = time.monotonic() + NEWS_LIMIT_S
        joined = await asyncio.to_thread(self._joined.read)
        while any(endpoint not in self._endpoints[replica] for replica, endpoint in joined.items()):
            if time.monotonic() > deadline_s:
                raise EngineDead("This HTTP process has not heard of an engine that has started; try again.")
            await asyncio.sleep(_LOOK_S / 10)

    async def _sync(self, client: EngineClient, endpoint: str) -> None:
        async with self._joined.locked():
            recorded = await asyncio.to_thread(self._recorded)
            await _answer(client, RestoreAdapters(_new_id(), recorded))
            await asyncio.to_thread(self._joined.note, client.replica, endpoint)


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


async def _unloaded(
    unloading: Sequence[Awaitable[Reply | BaseException]], refused: Sequence[Reply | BaseException]
) -> AdapterUnloaded:
    """The end of an unloading at all engines; RequestRejected or EngineDead."""
    answers = await asyncio.gather(*unloading, return_exceptions=True)
    freed = [answer.num_bytes for answer in answers if isinstance(answer, AdapterUnloaded)]
    if not freed:
        raise _whole_failure([*answers, *refused])
    return AdapterUnloaded("", sum(freed))


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


def _is_failure(outcome: object) -> bool:
    return isinstance(outcome, BaseException)


def _first_failure(clients: Sequence[EngineClient], answers: Sequence[object]) -> Exception | None:
    """Why not all engines have succeeded, which names the one that failed unless all failed alike."""
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
    """Why no engine has succeeded: the reason of one that refused, rather than of one that has ended."""
    refused = [answer for answer in answers if isinstance(answer, RequestRejected)]
    for answer in (*refused, *answers):
        if isinstance(answer, Exception):
            return answer
    return EngineDead("No engine takes requests.")
