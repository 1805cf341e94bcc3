"""Runs fine-tuning jobs, one at a time, in the HTTP process that holds the folder's lock.

A job trains in a process of its own (worker.py). A restarted server continues its jobs from their last checkpoints, and
serves the adapters of those that have succeeded.
"""

import asyncio
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from stellarbyte_server.batch.files import KEPT_S, Files, StoredFile, new_file_id, write_all
from stellarbyte_server.batch.folder import DataFolder
from stellarbyte_server.tuning.checking import Examples, check_files, placed
from stellarbyte_server.tuning.examples import Problem, in_one_sentence
from stellarbyte_server.tuning.jobs import Change, Event, Hyperparameters, Job, JobError, Publication, Status
from stellarbyte_server.tuning.plan import Plan, chosen
from stellarbyte_server.tuning.progress import Progress
from stellarbyte_server.tuning.results import checkpoint_name, metrics_csv, model_name, not_published, published
from stellarbyte_server.tuning.store import TuningStore
from stellarbyte_server.tuning.worker import COMMAND, Worker

logger = logging.getLogger("server.tuning")

LOOK_S = 0.25  # between polls for new and changed jobs
_CLEAN_S = 60.0
_RETRY_S = 10.0  # after an error of the server
MAX_LOST = 1  # processes of one job that may end by themselves
SHOWN_PROBLEMS = 10  # of a file


class CannotLoad(Exception):
    """The engine does not accept an adapter; str() is one sentence."""


class EngineAway(Exception):
    """The engine cannot answer now; another may take its place."""


Load = Callable[[str, str], Awaitable[None]]  # name, folder; raises CannotLoad, EngineAway
Publish = Callable[[str, Path, Publication], Awaitable[int]]  # job, folder → version; CannotLoad, EngineAway
Live = Callable[[str], tuple[Path, int] | None]  # name → folder and number of its current version; may block
Unload = Callable[[str], Awaitable[None]]  # name, of which there may be no adapter; raises EngineAway


@dataclass(frozen=True, kw_only=True)
class Server:
    """What the runner needs of the server around it."""

    load: Load
    unload: Unload
    publish: Publish
    live: Live
    is_open: Callable[[], bool]  # whether the engine takes adapters now
    is_busy: Callable[[], bool]  # whether requests run or wait
    max_tokens: Callable[[str], int | None]  # of a job of this owner; LookupError: its key no longer exists


class TuningRunner:
    """Runs on the event loop; `run` is cancelled when the process ends."""

    def __init__(
        self,
        store: TuningStore,
        folder: DataFolder,
        files: Files,
        plan: Plan,
        server: Server,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._store = store
        self._folder = folder
        self._files = files
        self._plan = plan
        self._server = server
        self._command = command
        self._running: asyncio.Task[None] | None = None
        self._are_served = False  # the adapters of earlier jobs
        self._cleaned_s = -_CLEAN_S

    async def run(self) -> None:
        while (lock := self._folder.lock("tuning.lock")) is None:
            await asyncio.sleep(1)
        try:
            while True:
                try:
                    await self._look()
                    await asyncio.sleep(LOOK_S)
                except Exception:
                    logger.exception("cannot look for fine-tuning jobs; trying again in %.0f s", _RETRY_S)
                    await asyncio.sleep(_RETRY_S)
        finally:
            if self._running is not None:
                self._running.cancel()
                await asyncio.gather(self._running, return_exceptions=True)
            os.close(lock)

    async def _look(self) -> None:
        if not self._server.is_open():
            return
        if not self._are_served:
            await self._serve_models()
            self._are_served = True
        for job in await asyncio.to_thread(self._store.jobs.with_status, "validating_files"):
            await asyncio.to_thread(self._check, job)
        if self._running is None or self._running.done():
            # A running job of an interrupted server comes first.
            waiting = [job for status in _RUNNABLE for job in await self._with_status(status)]
            self._running = asyncio.create_task(self._run_logged(waiting[0])) if waiting else None
            if self._running is None and time.monotonic() - self._cleaned_s >= _CLEAN_S:
                self._cleaned_s = time.monotonic()
                await asyncio.to_thread(self._store.jobs.forget_old)
        await asyncio.to_thread(self._store.sweep)

    async def _with_status(self, status: Status) -> list[Job]:
        return await asyncio.to_thread(self._store.jobs.with_status, status)

    async def _serve_models(self) -> None:
        """Load the adapters of all jobs that have succeeded."""
        for job in await asyncio.to_thread(self._store.jobs.with_models):
            assert job.fine_tuned_model is not None
            try:
                await self._load(job, job.fine_tuned_model)
            except CannotLoad as error:
                logger.error("the fine-tuned model %s is not served: %s", job.fine_tuned_model, error)

    async def _load(self, job: Job, name: str) -> None:
        """Load a job's adapter and those of its checkpoints; CannotLoad."""
        for each, folder in self._adapters(job, name):
            await self._server.load(each, str(folder))

    async def _unload(self, job: Job, name: str) -> None:
        """Unload what `_load` has loaded, of a job that has no model."""
        for each, _ in self._adapters(job, name):
            await self._server.unload(each)

    def _adapters(self, job: Job, name: str) -> list[tuple[str, Path]]:
        """Names and folders of a job's model `name` and of its checkpoints."""
        checkpoints = [
            (checkpoint_name(name, checkpoint.step), self._store.checkpoint(job.id, checkpoint.step))
            for checkpoint in job.checkpoints
        ]
        return [(name, self._store.adapter(job.id)), *checkpoints]

    def _check(self, job: Job) -> None:
        """Check the files of a job; it is then queued, or has failed."""
        folder = self._store.of_job(job.id)
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted check
        folder.mkdir(mode=0o700)
        examples = Examples(owner=job.owner, training_file=job.training_file, validation_file=job.validation_file)
        try:
            checked = check_files(self._files, examples, folder, self._plan.shown)
        except OSError as error:
            message = f"The examples could not be stored: {error.strerror or error}."
            self._fail(job, "storage_unavailable", message)
            return
        if checked.problems:
            file_id = job.training_file if checked.param == "training_file" else job.validation_file
            message = in_one_sentence(str(file_id), checked.problems)
            self._fail(job, f"invalid_{checked.param}", message, checked.param, checked.problems)
            return
        hyperparameters = chosen(job.hyperparameters, checked.num_examples["training_file"])
        queued = Event(message="Files validated, moving job to queued state")
        self._change(job, partial(_queued, hyperparameters=hyperparameters), [queued])

    async def _run_logged(self, job: Job) -> None:
        try:
            await self._run(job)
        except EngineAway:
            await asyncio.sleep(LOOK_S)  # the job is run again
        except Exception as error:
            logger.exception("the fine-tuning job %s failed", job.id)
            reason = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
            message = f"The server could not run the job{reason}; its log has the reason."
            try:
                await asyncio.to_thread(self._fail, job, "server_error", message)
            except Exception:
                logger.exception("the job's end cannot be noted; trying again in %.0f s", _RETRY_S)
                await asyncio.sleep(_RETRY_S)

    async def _run(self, job: Job) -> None:
        started = Event(message="Fine-tuning job started")
        now = await asyncio.to_thread(self._change, job, _begun, [started])
        if now is None or now.status != "running":
            return
        try:
            max_tokens = self._server.max_tokens(job.owner)
        except LookupError:
            message = "The API key that made the job no longer exists."
            await asyncio.to_thread(self._fail, job, "invalid_api_key", message)
            return
        adapter = self._store.adapter(job.id)
        await asyncio.to_thread(self._keep_previous, now)
        # It is there if an earlier server has ended just before the end of the job.
        if not adapter.exists() and not await self._train(now, max_tokens):
            return
        now = await asyncio.to_thread(self._store.jobs.find, job.id)
        if now is not None and now.status == "running":
            await self._finish(now, adapter)

    def _keep_previous(self, job: Job) -> None:
        """Copy the version that is live where the result is to be, when the job begins for the first time. OSError."""
        if job.publish is None or job.validation_file is None or self._store.previous(job.id).exists():
            return
        found = None if job.last_evaluation >= 0 else self._server.live(job.publish.name)
        if found is None:
            return
        folder, number = found
        try:
            self._store.keep_previous(job.id, folder)
        except FileNotFoundError:  # it was unloaded just now
            return
        event = Event(message=f"Compares with {job.publish.name}, version {number}")
        self._store.jobs.note(job.id, event)

    async def _train(self, job: Job, max_tokens: int | None) -> bool:
        """Train a job; returns whether its adapter is complete. Otherwise its state says why."""
        previous = self._store.previous(job.id)
        settings = self._plan.settings(
            self._store.of_job(job.id),
            job.hyperparameters,
            seed=job.seed,
            has_validation=job.validation_file is not None,
            max_tokens=max_tokens,
            previous=previous if previous.exists() else None,
            evaluate=job.evaluate,
        )
        worker = await Worker.start(settings, self._command)
        progress = Progress(job)
        reading = asyncio.create_task(self._read(worker, progress))
        was_busy = False
        try:
            while not reading.done():
                if (is_busy := self._server.is_busy()) != was_busy:
                    worker.tell(is_busy=is_busy)
                    was_busy = is_busy
                await asyncio.wait({reading}, timeout=LOOK_S)
                now = await asyncio.to_thread(self._note, job, progress)
                if now is None or now.status == "cancelled":
                    worker.kill()
                elif now.status != "running":  # paused, and perhaps waiting again
                    worker.save_and_end()
                    await reading
            reading.result()
            status = await worker.ended()
        finally:
            reading.cancel()
            await worker.stop()
        now = await asyncio.to_thread(self._note, job, progress)
        if progress.end is not None and progress.end.type == "finished":
            return True
        if now is not None and now.status == "running":
            await asyncio.to_thread(self._note_end, now, progress, status)
        return False

    async def _read(self, worker: Worker, progress: Progress) -> None:
        while (message := await worker.read()) is not None:
            progress.add(message)

    def _note(self, job: Job, progress: Progress) -> Job | None:
        """Add what the process has told to the job, which may be paused meanwhile; returns the job."""
        apply, events = progress.take()
        return self._store.jobs.change(job.id, lambda now: now if now.is_over else apply(now), events)

    def _note_end(self, job: Job, progress: Progress, status: int) -> None:
        """A process has ended without a result, and nobody has asked for it."""
        end = progress.end
        if end is not None and end.type == "refused":
            param, _ = placed(end)
            code = _REASONS.get(end.about, "training_failed") if param is None else f"invalid_{param}"
            self._fail(job, code, end.message, param)
            return
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        if job.num_lost >= MAX_LOST:
            message = f"The training process ended unexpectedly for the second time ({how})."
            self._fail(job, "worker_lost", message)
            return
        message = f"The training process ended unexpectedly ({how}); continuing from its last checkpoint"
        lost = partial(msgspec.structs.replace, num_lost=job.num_lost + 1)
        self._change(job, lost, [Event(message=message, level="warn")])

    async def _finish(self, job: Job, adapter: Path) -> None:
        name = await asyncio.to_thread(model_name, self._plan.base, job.suffix, job.id, adapter)
        try:
            await self._load(job, name)
        except CannotLoad as error:
            await self._unload(job, name)
            await asyncio.to_thread(self._fail, job, "adapter_refused", f"The adapter cannot be served: {error}")
            return
        events = [Event(message=f"New fine-tuned model created: {name}")]
        live = None
        if job.publish is not None:
            now = await asyncio.to_thread(self._change, job, _going_live)
            if now is not None and now.goes_live:
                live, event = await self._publish(job, adapter, job.publish)
                events.append(event)
        try:
            file_id = await asyncio.to_thread(self._write_metrics, job)
        except (OSError, sqlite3.Error) as error:  # the model is served already
            logger.warning("the losses of %s cannot be written: %s", job.id, error)
            file_id = None
        ended = partial(_succeeded, name=name, file_id=file_id, live=live)
        events.append(Event(message="The job has completed"))
        now = await asyncio.to_thread(self._change, job, ended, events)
        if now is None or now.fine_tuned_model != name:  # it was cancelled meanwhile
            await self._unload(job, name)
            return
        logger.info("fine-tuning job %s: %s", job.id, name)

    async def _publish(self, job: Job, adapter: Path, asked: Publication) -> tuple[Publication, Event]:
        """Make a result live under the name that was asked for, unless the engine refuses it; EngineAway."""
        try:
            try:
                await asyncio.to_thread(self._server.max_tokens, job.owner)
            except LookupError:
                raise CannotLoad("The API key that asked for it no longer exists.") from None
            version = await self._server.publish(job.id, adapter, asked)
        except CannotLoad as error:
            return msgspec.structs.replace(asked, error=str(error)), not_published(asked.name, error)
        live = msgspec.structs.replace(asked, version=version)
        return live, published(live)

    def _write_metrics(self, job: Job) -> str:
        events = [event for _, event in self._store.jobs.events_since(job.id, None, -1)]
        content = metrics_csv(job, events)
        name = f"{job.id}.metrics"
        self._folder.remove("work", name)
        with self._folder.open("work", name, "xb") as file:
            write_all(file, content)
            os.fsync(file.fileno())
        now = int(time.time())
        stored = StoredFile(
            id=new_file_id(),
            owner=job.owner,
            filename=f"step_metrics_{job.id}.csv",
            purpose="fine-tune-results",
            bytes=len(content),
            created_at=now,
            expires_at=now + KEPT_S,
        )
        self._files.adopt(name, stored)
        return stored.id

    def _change(self, job: Job, change: Change, events: Sequence[Event] = ()) -> Job | None:
        """Change a job, unless it is over."""
        return self._store.jobs.change(job.id, lambda now: now if now.is_over else change(now), events)

    def _fail(
        self, job: Job, code: str, message: str, param: str | None = None, problems: Sequence[Problem] = ()
    ) -> None:
        error = JobError(code=code, message=message, param=param)
        events = [Event(message=problem.shown, level="error") for problem in problems[:SHOWN_PROBLEMS]]
        ended = partial(msgspec.structs.replace, status="failed", error=error, finished_at=int(time.time()))
        self._change(job, ended, [*events, Event(message=f"The job failed: {message}", level="error")])
        logger.info("fine-tuning job %s failed: %s", job.id, message)


_RUNNABLE: tuple[Status, ...] = ("running", "queued")
_REASONS = {"memory": "insufficient_memory", "run": "training_failed"}


def _begun(job: Job) -> Job:
    return msgspec.structs.replace(job, status="running") if job.status == "queued" else job


def _queued(job: Job, *, hyperparameters: Hyperparameters) -> Job:
    status = "queued" if job.status == "validating_files" else job.status
    return msgspec.structs.replace(job, status=status, hyperparameters=hyperparameters)


def _going_live(job: Job) -> Job:
    """Also of a job that was paused just now: its training is done."""
    return msgspec.structs.replace(job, goes_live=True)


def _succeeded(job: Job, *, name: str, file_id: str | None, live: Publication | None) -> Job:
    return msgspec.structs.replace(
        job,
        status="succeeded",
        fine_tuned_model=name,
        publish=job.publish if live is None else live,
        goes_live=False,
        result_files=() if file_id is None else (file_id,),
        finished_at=int(time.time()),
        estimated_finish=None,
    )
