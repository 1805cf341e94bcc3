"""Changes of adapters over HTTP, each by the same steps.

Every engine reads and checks the versions beside the current one; the record names them, which decides; then requests
get them. An engine that starts gets the record. So the end of a process at any point leaves the state before or after
the change, and a refusal changes nothing. The caller holds the name's lock.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import msgspec

from stellarbyte_server.api.contract.errors import ApiError, bad_request
from stellarbyte_server.api.service import Service
from stellarbyte_server.client.engine_client import EngineDead
from stellarbyte_server.config.setting_values import is_adapter_name
from stellarbyte_server.protocol.messages import AdapterLoaded, AdapterUnloaded
from stellarbyte_server.protocol.request import ADAPTER_NOT_FOUND, RequestRejected
from stellarbyte_server.registry.record import NameRecord, Version, VersionError, next_number, with_version
from stellarbyte_server.registry.store import AdapterRegistry, Content

logger = logging.getLogger("server.adapters")

T = TypeVar("T")
R = TypeVar("R")
RESTART_LIMIT_S = 120.0  # how long a change waits for an engine that is being restarted
_POLL_S = 0.1


class AdapterVersions:
    """The adapters of a server's record. Methods raise RequestRejected, EngineDead or ApiError."""

    def __init__(self, service: Service, registry: AdapterRegistry) -> None:
        self._settings = service.settings.engine
        self._client = service.client
        self._registry = registry

    async def record(self, name: str) -> NameRecord:
        record = await asyncio.to_thread(self._registry.record, name)
        if record is None:
            message = f"There is no adapter {name!r:.200} that was loaded over HTTP; only those have versions."
            raise ApiError(404, message, code=ADAPTER_NOT_FOUND)
        return record

    async def load(
        self,
        name: str,
        path: str,
        *,
        in_place: bool,
        pinned: bool | None,
        probe: bool,
        caller: str,
        job: str = "",
        share: float | None = None,
    ) -> tuple[AdapterLoaded, NameRecord]:
        """Store the adapter at a path as the new current version of a name; `pinned` None: as before.

        `share`: of the callers who get it, if the name has a version before it, which the others get; None: all.
        """
        located = await self._client.locate_adapter(path)
        content = await self._stored(self._registry.keep, located)
        try:
            before = await asyncio.to_thread(self._registry.record, name)
            if share is not None and before is None and await self._is_offered(name):
                raise bad_request(
                    f"The adapter {name!r} was not loaded over HTTP, so its callers cannot be split; leave out 'share',"
                    " or load it over HTTP first.",
                    "share",
                )
            pins = before is not None and before.pinned if pinned is None else pinned
            loaded = await self._load_beside(before, name, content, in_place, pins, probe)
            if before is not None and not loaded.is_used:  # the current version has this content
                after = msgspec.structs.replace(before, shares=(), pinned=pins)
                if share is not None:
                    after = await self._shared(before, after, before.version_before(), share)
                if after != before:
                    await self._change(before, after, name)
                return loaded, after
            version = _version(before, content, loaded, caller, job)
            after = with_version(before, version, name, self._registry.history, pinned=pins)
            if share is not None and before is not None:
                after = await self._shared(before, after, before.version(before.current), share)
            await self._change(before, after, name)
        finally:
            await asyncio.to_thread(self._registry.discard_unnamed, name, content.folder)
        logger.info(
            "adapter %s: version %d (%s) loaded by %s", name, version.number, version.content_hash[:12], _who(caller)
        )
        if before is not None:
            await self._discard(name, set(before.versions) - set(after.versions))
        return loaded, after

    async def _load_beside(
        self, before: NameRecord | None, name: str, content: Content, in_place: bool, pinned: bool, probe: bool
    ) -> AdapterLoaded:
        """Have every engine read and check a content; if one fails, none keeps it."""
        stored = self._registry.stored_content(content)
        try:
            return await self._client.prepare_adapter(name, stored, in_place=in_place, pinned=pinned, probe=probe)
        except (RequestRejected, EngineDead):
            await self._go_back(before, name)
            raise

    async def _shared(self, before: NameRecord, after: NameRecord, other: Version | None, share: float) -> NameRecord:
        """`after` with callers split between another version and its current one."""
        try:
            return after.shared_with(other, share)
        except VersionError as error:
            await self._go_back(before, after.name)
            raise bad_request(str(error), "share") from None

    async def roll_back(self, name: str, text: str | None, caller: str) -> NameRecord:
        """Make an earlier version current: the one before, or one by its number or content hash."""
        before = await self.record(name)
        try:
            version = before.before() if text is None else before.find(text)
        except VersionError as error:
            raise bad_request(str(error), "version") from None
        after = before.rolled_back(version.number)
        await self._change(before, after, name)
        logger.info("adapter %s: rolled back to version %d by %s", name, version.number, _who(caller))
        return after

    async def split(self, name: str, shares: dict[str, float], caller: str) -> NameRecord:
        """Divide the callers of a name among versions; without shares all get the current one."""
        before = await self.record(name)
        try:
            after = before.split(shares)
        except VersionError as error:
            raise bad_request(str(error), "shares") from None
        await self._change(before, after, name)
        shown = ", ".join(f"version {number}: {share:g}" for number, share in after.shares) or "ended"
        logger.info("adapter %s: split (%s) by %s", name, shown, _who(caller))
        return after

    async def unload(self, name: str, caller: str) -> Awaitable[AdapterUnloaded]:
        """Unload an adapter and forget its versions; what is returned waits for its last requests, without the lock.

        The record decides: engines that end meanwhile start without the adapter.
        """
        is_offered = await self._is_offered(name)
        record = await asyncio.to_thread(self._registry.record, name)
        if is_offered:
            await self._stored(self._registry.withdraw, name)
        if record is not None:
            await self._stored(self._registry.remove, name)
        try:
            unloading = await self._client.begin_unload(name)
            logger.info("adapter %s: unloaded by %s", name, _who(caller))
        except (RequestRejected, EngineDead) as error:
            unloading = asyncio.get_running_loop().create_future()
            unloading.set_exception(error)
        is_recorded = is_offered or record is not None
        return asyncio.create_task(self._drained(name, record, unloading, is_recorded=is_recorded))

    async def _is_offered(self, name: str) -> bool:
        """Whether engines offer a name without the record: as one of --lora-modules or a folder of --adapter-dir."""
        if name in dict(self._settings.lora_modules):
            return True
        if self._settings.adapter_dir is None or not is_adapter_name(name) or "/" in name:
            return False
        try:
            await self._client.locate_adapter(name)
        except RequestRejected:
            return False
        return True

    async def _drained(
        self, name: str, record: NameRecord | None, unloading: Awaitable[AdapterUnloaded], *, is_recorded: bool
    ) -> AdapterUnloaded:
        try:
            unloaded = await unloading
        except EngineDead:
            if not is_recorded or self._client.health() is None:  # engines that live still serve it
                raise
            unloaded = AdapterUnloaded("", 0)
        except RequestRejected as error:
            if record is None or error.code != ADAPTER_NOT_FOUND:
                raise
            unloaded = AdapterUnloaded("", 0)
        if record is not None:
            await self._discard(name, record.versions)
        return unloaded

    async def _change(self, before: NameRecord | None, after: NameRecord, name: str) -> None:
        try:
            await self._prepare(after)
            await self._stored(self._registry.write, after)
        except (RequestRejected, EngineDead, ApiError):
            await self._go_back(before, name)
            raise
        await self._follow(after)

    async def _go_back(self, before: NameRecord | None, name: str) -> None:
        """Have every engine forget the versions beside those of the record."""
        try:
            if before is None:
                await self._client.set_versions(name, "")
            else:
                await self._serve(before)
        except (RequestRejected, EngineDead) as error:  # the next change of the name removes them
            logger.warning("adapter %s: versions that were not made current may stay in memory: %s", name, error)

    async def _prepare(self, record: NameRecord) -> None:
        """Have every engine read the versions that it lacks."""
        for version in record.live:
            await self._client.prepare_adapter(record.name, self._registry.stored(version))

    async def _serve(self, record: NameRecord) -> None:
        """Let requests get what a record says."""
        current = record.version(record.current).content_hash
        await self._client.set_versions(record.name, current, record.hashed_shares(), pinned=record.pinned)

    async def _follow(self, record: NameRecord) -> None:
        """Make every engine do as a written record says, also one that was started with an earlier record."""
        deadline_s = time.monotonic() + RESTART_LIMIT_S
        while True:
            try:
                await self._serve(record)
                return
            except (EngineDead, RequestRejected):
                if self._client.dead.is_set() or time.monotonic() > deadline_s:
                    raise
            await asyncio.sleep(_POLL_S)
            try:
                await self._prepare(record)
            except (EngineDead, RequestRejected):
                continue

    async def _discard(self, name: str, versions: Iterable[Version]) -> None:
        """Remove the contents of forgotten versions. Those that still serve requests stay until the next start."""
        try:
            cards = (await self._client.list_adapters()).cards
        except EngineDead:
            cards = ()  # and no requests
        used = {card.content_hash for card in cards if card.name == name}
        for version in versions:
            if version.content_hash not in used:
                await asyncio.to_thread(self._registry.discard, version.folder)

    async def _stored(self, work: Callable[[T], R], argument: T) -> R:
        """Write to the disk in a thread; ApiError if that fails."""
        try:
            return await asyncio.to_thread(work, argument)
        except OSError as error:
            place = "--data-dir" if self._registry.is_durable else "the temporary folder"
            logger.error("%s: %s", place, error)
            raise ApiError(500, f"The adapter could not be stored in {place}: {error.strerror}.") from None


def _version(before: NameRecord | None, content: Content, loaded: AdapterLoaded, caller: str, job: str) -> Version:
    return Version(
        number=next_number(before),
        content_hash=loaded.card.content_hash,
        folder=content.folder,
        file_hashes=content.file_hashes,
        source=content.source,
        created_at=int(time.time()),
        created_by=caller,
        probe=loaded.probe,
        job=job,
        rank=loaded.card.rank,
        num_bytes=loaded.card.num_bytes,
        invocation=loaded.card.invocation,
    )


def _who(caller: str) -> str:
    return caller or "a caller without a key"
