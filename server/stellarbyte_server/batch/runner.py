"""Runs the requests of batches, in the HTTP process that holds the folder's lock.

Requests pass through the application like any other (`Ask`), at the lowest priority and with the key that made the
batch. A restarted server continues its batches.
"""

import asyncio
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import msgspec

from stellarbyte_server.batch.batches import Batch, BatchProblem, Ending
from stellarbyte_server.batch.input_lines import LinePlace, body_at, check_input
from stellarbyte_server.batch.results import Answer, Results, planned, publish
from stellarbyte_server.batch.storage import Storage

logger = logging.getLogger("server.batch")

MAX_BATCHES = 16  # running at once; others wait
LOOK_S = 0.25  # between polls for new and cancelled batches
_CLEAN_S = 60.0
_RETRY_S = 60.0  # after an error of the server, such as a full disk
_REFUSED = (429, 503)  # temporary refusals
# The number of temporary refusals after which a refusal becomes the answer: 503 means a crash during the request.
_MOST_REFUSALS = {"engine_unavailable": 3, "rate_limit_exceeded": 100}


class OwnerGone(Exception):
    """The key that made a batch no longer exists."""


Ask = Callable[[str, str, bytes], Awaitable[Answer]]  # owner, endpoint, body; raises OwnerGone


class BatchRunner:
    """Runs on the event loop; `run` is cancelled when the process ends."""

    def __init__(
        self, storage: Storage, ask: Ask, *, is_open: Callable[[], bool], at_once: int, max_body_bytes: int
    ) -> None:
        """`is_open`: whether the engine takes requests now; `at_once`: maximum concurrent requests of all batches."""
        self._storage = storage
        self._ask = ask
        self._is_open = is_open
        self._at_once = at_once
        self._max_body_bytes = max_body_bytes
        self._places = asyncio.Semaphore(at_once)
        self._running: dict[str, asyncio.Task[None]] = {}
        self._cleaned_s = -_CLEAN_S

    async def run(self) -> None:
        while (lock := self._storage.folder.lock("runner.lock")) is None:
            await asyncio.sleep(1)
        try:
            while True:
                try:
                    await self._start_new()
                    await asyncio.sleep(LOOK_S)
                except Exception:
                    logger.exception("cannot look for batches; trying again in %.0f s", _RETRY_S)
                    await asyncio.sleep(_RETRY_S)
        finally:
            for task in self._running.values():
                task.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)
            os.close(lock)

    async def _start_new(self) -> None:
        """Start new batches, and remove expired data."""
        if time.monotonic() - self._cleaned_s >= _CLEAN_S:
            self._cleaned_s = time.monotonic()
            await asyncio.to_thread(self._storage.remove_old)
        self._running = {batch_id: task for batch_id, task in self._running.items() if not task.done()}
        for batch in await asyncio.to_thread(self._storage.batches.unfinished, MAX_BATCHES):
            if batch.id not in self._running:
                self._running[batch.id] = asyncio.create_task(self._run_logged(batch))

    async def _run_logged(self, batch: Batch) -> None:
        try:
            await self._run(batch)
        except Exception:
            logger.exception("batch %s could not go on; trying again in %.0f s", batch.id, _RETRY_S)
            await asyncio.sleep(_RETRY_S)

    async def _run(self, batch: Batch) -> None:
        if batch.ending is None:
            batch, places = await self._start(batch)
        if batch.ending is None:
            results = await asyncio.to_thread(Results, self._storage.folder, batch)
            try:
                running = _RunningBatch(self._storage, batch, places, results, self._ask_until_answered)
                ending = await running.run(self._at_once)
                await asyncio.to_thread(results.sync)
                plan = partial(_plan, results=results, ending=ending, problems=running.problems)
                batch = await self._change(batch, plan)
            finally:
                results.close()
        await asyncio.to_thread(publish, batch, self._storage.folder, self._storage.files, int(time.time()))
        await self._change(batch, _ended)
        logger.info("batch %s: %s", batch.id, batch.ending)

    async def _change(self, batch: Batch, change: Callable[[Batch], Batch]) -> Batch:
        changed = await asyncio.to_thread(self._storage.batches.change, batch.id, change)
        assert changed is not None, "only batches that are over are forgotten"
        return changed

    async def _start(self, batch: Batch) -> tuple[Batch, list[LinePlace]]:
        """Check the input of a batch. Returns the batch and its requests; with invalid input, `ending` is failed."""
        places, problems = await asyncio.to_thread(self._check, batch)

        def begin(now: Batch) -> Batch:
            if problems:
                return msgspec.structs.replace(now, ending="failed", status="finalizing", problems=tuple(problems))
            counts = msgspec.structs.replace(now.counts, total=len(places))
            if now.status != "validating":
                return msgspec.structs.replace(now, counts=counts)
            return msgspec.structs.replace(now, status="in_progress", counts=counts, in_progress_at=int(time.time()))

        return await self._change(batch, begin), places

    def _check(self, batch: Batch) -> tuple[list[LinePlace], list[BatchProblem]]:
        file = self._storage.files.find(batch.owner, batch.input_file_id, even_expired=True)
        try:
            if file is None:
                raise FileNotFoundError
            with self._storage.files.open(file) as content:
                return check_input(content, batch.endpoint, self._max_body_bytes)
        except FileNotFoundError:
            message = f"The file {batch.input_file_id} no longer exists."
            return [], [BatchProblem(code="file_not_found", message=message, param="input_file_id")]

    async def _ask_until_answered(self, batch: Batch, place: LinePlace) -> Answer:
        """The final answer to a request. After a temporary refusal it waits, without a place among running requests."""
        refusals: Counter[str | None] = Counter()
        while True:
            async with self._places:
                while not self._is_open():
                    await asyncio.sleep(LOOK_S)
                body = await asyncio.to_thread(self._body, batch, place)
                answer = await self._ask(batch.owner, batch.endpoint, body)
            code = answer.error_code
            refusals[code] += 1
            most = _MOST_REFUSALS.get(code or "")
            if answer.status not in _REFUSED or (most is not None and refusals[code] >= most):
                return answer
            await asyncio.sleep(max(LOOK_S, answer.retry_after_s or 1))

    def _body(self, batch: Batch, place: LinePlace) -> bytes:
        file = self._storage.files.find(batch.owner, batch.input_file_id, even_expired=True)
        if file is None:
            raise FileNotFoundError(batch.input_file_id)
        with self._storage.files.open(file) as content:
            return body_at(content, place)


AskLine = Callable[[Batch, LinePlace], Awaitable[Answer]]


class _RunningBatch:
    """Runs the remaining requests of one batch."""

    def __init__(self, storage: Storage, batch: Batch, places: list[LinePlace], results: Results, ask: AskLine) -> None:
        self.problems: tuple[BatchProblem, ...] = ()
        self._storage = storage
        self._batch = batch
        self._results = results
        self._ask = ask
        self._left = deque(place for place in places if place.custom_id not in results.done)

    async def run(self, at_once: int) -> Ending:
        """Run until the end, and return how the batch ends; requests still running then have no results."""
        workers = [asyncio.create_task(self._work()) for _ in range(min(at_once, len(self._left)))]
        watcher = asyncio.create_task(self._watch())
        everything = asyncio.ensure_future(asyncio.gather(*workers))
        try:
            ends: set[asyncio.Future[Any]] = {everything, watcher}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not everything.done():
                ending = watcher.result()
            elif isinstance(error := everything.exception(), OwnerGone):
                ending = self._fail("invalid_api_key", "The API key that made the batch no longer exists.")
            elif error is not None:
                raise error
            else:
                ending = "completed"
        finally:
            for task in (watcher, *workers):
                task.cancel()
            await asyncio.gather(watcher, everything, *workers, return_exceptions=True)
        if ending == "expired":
            await asyncio.to_thread(self._note_expired)
        return ending

    async def _work(self) -> None:
        while self._left:
            place = self._left.popleft()
            try:
                answer = await self._ask(self._batch, place)
                await _to_its_end(asyncio.to_thread(self._results.add_answer, place.custom_id, answer))
            except BaseException:
                self._left.append(place)
                raise

    async def _watch(self) -> Ending:
        """Record the progress until the batch must end early; returns how it ends."""
        storage, batch = self._storage, self._batch
        stored = await asyncio.to_thread(storage.files.used_bytes, batch.owner)
        while True:
            await asyncio.to_thread(self._results.sync)
            counts = self._results.counts(batch.counts.total)
            counted = partial(msgspec.structs.replace, counts=counts)
            now = await asyncio.to_thread(storage.batches.change, batch.id, counted)
            if now is None or now.status == "cancelling":
                return "cancelled"
            if time.time() >= now.expires_at:
                return "expired"
            if stored + self._results.num_bytes > storage.files.limits.owner_bytes:
                return self._fail("storage_full", "The key's files would exceed its storage limit.")
            await asyncio.sleep(LOOK_S)

    def _fail(self, code: str, message: str) -> Ending:
        self.problems = (BatchProblem(code=code, message=message),)
        return "failed"

    def _note_expired(self) -> None:
        for place in self._left:
            if place.custom_id not in self._results.done:
                self._results.add_expired(place.custom_id)


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Wait for work in a thread to its end, even if the caller is cancelled, because the thread continues."""
    working = asyncio.ensure_future(work)
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait({working})
        raise


def _plan(batch: Batch, *, results: Results, ending: Ending, problems: tuple[BatchProblem, ...]) -> Batch:
    """The batch before its end. If it was cancelled while its last request ran, it ends as cancelled."""
    ending = "cancelled" if batch.status == "cancelling" else ending
    return msgspec.structs.replace(planned(batch, results, ending, int(time.time())), problems=problems)


def _ended(batch: Batch) -> Batch:
    assert batch.ending is not None
    return msgspec.structs.replace(batch, status=batch.ending, ended_at=int(time.time()))
