"""Runs fine-tuning jobs, one at a time, in the HTTP process that holds the folder's lock.

A job trains in a process of its own (worker.py). A restarted server continues its jobs from their last checkpoints, and
serves the adapters of those that have succeeded.
"""

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from stellarbyte_server.batch.files import KEPT_S, Files, StoredFile, new_file_id, write_all
from stellarbyte_server.batch.folder import DataFolder
from stellarbyte_server.tuning.examples import Problem, Template, check_examples, in_one_sentence
from stellarbyte_server.tuning.jobs import Change, Event, Hyperparameters, Job, JobError, Status
from stellarbyte_server.tuning.progress import Progress
from stellarbyte_server.tuning.results import checkpoint_name, metrics_csv, model_name
from stellarbyte_server.tuning.store import CHATS, VALIDATION, TuningStore
from stellarbyte_server.tuning.worker import COMMAND, Settings, Worker

logger = logging.getLogger("server.tuning")

LOOK_S = 0.25  # between polls for new and changed jobs
_CLEAN_S = 60.0
_RETRY_S = 10.0  # after an error of the server
MAX_LOST = 1  # processes of one job that may end by themselves
_SHOWN_PROBLEMS = 10


class CannotLoad(Exception):
    """The engine does not accept an adapter; str() is one sentence."""


class EngineAway(Exception):
    """The engine cannot answer now; another may take its place."""


Load = Callable[[str, str], Awaitable[None]]  # name, folder; raises CannotLoad, EngineAway
Unload = Callable[[str], Awaitable[None]]  # name, of which there may be no adapter; raises EngineAway


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Of all jobs: what `Settings` has beyond a job."""

    model: str
    base: str  # the model's name in the API
    template: str | None
    rank: int
    context: int
    device: str
    threads: int
    memory: int | None
    shown: Template


@dataclass(frozen=True, kw_only=True)
class Server:
    """What the runner needs of the server around it."""

    load: Load
    unload: Unload
    is_open: Callable[[], bool]  # whether the engine takes adapters now
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
        numbers = []
        for param, file_id, name in (
            ("training_file", job.training_file, CHATS),
            ("validation_file", job.validation_file, VALIDATION),
        ):
            if file_id is None:
                continue
            try:
                number, problems = self._checked(job, file_id, folder / name)
            except OSError as error:
                message = f"The examples could not be stored: {error.strerror or error}."
                self._fail(job, "storage_unavailable", message)
                return
            if problems:
                self._fail(job, f"invalid_{param}", in_one_sentence(file_id, problems), param, problems)
                return
            numbers.append(number)
        chosen = _chosen(job.hyperparameters, numbers[0])
        queued = Event(message="Files validated, moving job to queued state")
        self._change(job, partial(_queued, hyperparameters=chosen), [queued])

    def _checked(self, job: Job, file_id: str, target: Path) -> tuple[int, list[Problem]]:
        file = self._files.find(job.owner, file_id)
        try:
            if file is None:
                raise FileNotFoundError
            with self._files.open(file) as content, open(target, "xb", buffering=0) as normalized:
                return check_examples(content, normalized, self._plan.shown)
        except FileNotFoundError:
            return 0, [Problem(None, "The file no longer exists.")]

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
        # It is there if an earlier server has ended just before the end of the job.
        if not adapter.exists() and not await self._train(now, max_tokens):
            return
        now = await asyncio.to_thread(self._store.jobs.find, job.id)
        if now is not None and now.status == "running":
            await self._finish(now, adapter)

    async def _train(self, job: Job, max_tokens: int | None) -> bool:
        """Train a job; returns whether its adapter is complete. Otherwise its state says why."""
        worker = await Worker.start(self._settings(job, max_tokens), self._command)
        progress = Progress(job)
        reading = asyncio.create_task(self._read(worker, progress))
        try:
            while not reading.done():
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
            code, param = _REASONS.get(end.about, ("training_failed", None))
            if param is not None and "validation_file" in end.message:
                code, param = "invalid_validation_file", "validation_file"
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
        file_id = await asyncio.to_thread(self._write_metrics, job)
        ended = partial(_succeeded, name=name, file_id=file_id)
        events = [Event(message=f"New fine-tuned model created: {name}"), Event(message="The job has completed")]
        now = await asyncio.to_thread(self._change, job, ended, events)
        if now is None or now.fine_tuned_model != name:  # it was cancelled meanwhile
            await self._unload(job, name)
            return
        logger.info("fine-tuning job %s: %s", job.id, name)

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
        events = [Event(message=problem.shown, level="error") for problem in problems[:_SHOWN_PROBLEMS]]
        ended = partial(msgspec.structs.replace, status="failed", error=error, finished_at=int(time.time()))
        self._change(job, ended, [*events, Event(message=f"The job failed: {message}", level="error")])
        logger.info("fine-tuning job %s failed: %s", job.id, message)

    def _settings(self, job: Job, max_tokens: int | None) -> Settings:
        folder, chosen = self._store.of_job(job.id), job.hyperparameters
        assert chosen.n_epochs is not None and chosen.batch_size is not None, "chosen when the files were checked"
        assert chosen.learning_rate_multiplier is not None
        return Settings(
            folder=str(folder),
            model=self._plan.model,
            chats=str(folder / CHATS),
            validation=None if job.validation_file is None else str(folder / VALIDATION),
            template=self._plan.template,
            seed=job.seed,
            epochs=chosen.n_epochs,
            batch=chosen.batch_size,
            learning_rate_multiplier=chosen.learning_rate_multiplier,
            rank=self._plan.rank,
            context=self._plan.context,
            device=self._plan.device,
            threads=self._plan.threads,
            memory=self._plan.memory,
            max_tokens=max_tokens,
        )


_RUNNABLE: tuple[Status, ...] = ("running", "queued")
_REASONS = {
    "data": ("invalid_training_file", "training_file"),
    "memory": ("insufficient_memory", None),
    "run": ("training_failed", None),
}


def _begun(job: Job) -> Job:
    return msgspec.structs.replace(job, status="running") if job.status == "queued" else job


def _queued(job: Job, *, hyperparameters: Hyperparameters) -> Job:
    status = "queued" if job.status == "validating_files" else job.status
    return msgspec.structs.replace(job, status=status, hyperparameters=hyperparameters)


def _succeeded(job: Job, *, name: str, file_id: str) -> Job:
    return msgspec.structs.replace(
        job,
        status="succeeded",
        fine_tuned_model=name,
        result_files=(file_id,),
        finished_at=int(time.time()),
        estimated_finish=None,
    )


def _chosen(asked: Hyperparameters, num_examples: int) -> Hyperparameters:
    """The hyperparameters for a number of examples; small files are read more often, as in OpenAI's cookbook."""
    epochs = 3
    if num_examples * epochs < 100:
        epochs = min(25, -(-100 // num_examples))
    elif num_examples * epochs > 25_000:
        epochs = max(1, 25_000 // num_examples)
    return Hyperparameters(
        n_epochs=epochs if asked.n_epochs is None else asked.n_epochs,
        batch_size=min(8, num_examples) if asked.batch_size is None else min(asked.batch_size, num_examples),
        learning_rate_multiplier=(1.0 if asked.learning_rate_multiplier is None else asked.learning_rate_multiplier),
    )
