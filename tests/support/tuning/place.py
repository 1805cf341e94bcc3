"""A data folder with a runner of fine-tuning jobs, around scripted training processes."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from stellarbyte_server.batch.files import Files, StoredFile, StoreLimits
from stellarbyte_server.batch.storage import Storage, claim_folder
from stellarbyte_server.tuning.examples import Template
from stellarbyte_server.tuning.jobs import Hyperparameters, Job, Publication, Status, new_job_id
from stellarbyte_server.tuning.plan import Plan
from stellarbyte_server.tuning.runner import Server, TuningRunner
from stellarbyte_server.tuning.store import TuningStore
from tests.support.tuning.chats import chats

PLAN = Plan(
    model="/model",
    base="tiny+one",
    template=None,
    rank=4,
    context=64,
    device="cpu",
    threads=1,
    memory=None,
    shown=Template(False, False),
)
LIMIT_S = 60


class Place:
    """A data folder, and what the server around the runner did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        os.close(claim_folder(str(folder / "data")))
        self.storage = Storage.open(str(folder / "data"), StoreLimits(file_bytes=10**6, owner_bytes=10**6))
        self.store = TuningStore.open(str(folder / "data"))
        self.loaded: dict[str, str] = {}
        self.load_error: Exception | None = None
        self.is_busy = False
        self.when_loaded: Callable[[str], None] = lambda _: None
        self.published: list[tuple[str, str, str]] = []  # job, name and folder
        self.live: tuple[Path, int] | None = None  # of any name
        self.publish_error: Exception | None = None
        self.when_published: Callable[[str], None] = lambda _: None
        self.script()

    def script(self, **fields: object) -> None:
        (self.folder / "script.json").write_text(json.dumps(fields))

    def starts(self) -> list[list[int]]:
        """The step and process of each start of a training process."""
        file = self.folder / "starts"
        return [list(map(int, line.split())) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def files(self) -> Files:
        return self.storage.files

    def upload(self, content: bytes, owner: str = "") -> StoredFile:
        upload = self.files.upload()
        upload.write(content)
        return self.files.keep(upload, owner=owner, filename="a", purpose="fine-tune", kept_s=3600)

    def job(
        self,
        content: bytes | None = None,
        validation: bytes | None = None,
        owner: str = "",
        most: int = 9,
        **fields: Any,
    ) -> str:
        job = Job(
            id=new_job_id(),
            owner=owner,
            model="tiny",
            training_file=self.upload(chats(10) if content is None else content, owner).id,
            validation_file=None if validation is None else self.upload(validation, owner).id,
            suffix="mine",
            seed=1,
            metadata=None,
            hyperparameters=Hyperparameters(n_epochs=2),
            created_at=int(time.time()),
            **fields,
        )
        self.store.jobs.create(job, most=most)
        return job.id

    def find(self, job_id: str) -> Job:
        job = self.store.jobs.find(job_id)
        assert job is not None
        return job

    def set(self, job_id: str, status: Status) -> None:
        self.store.jobs.change(job_id, lambda job: msgspec.structs.replace(job, status=status))

    def messages(self, job_id: str) -> list[str]:
        return [event.message for _, event in self.store.jobs.events_since(job_id, None, -1)]

    def steps(self, job_id: str) -> list[tuple[int, float]]:
        events = [event.data for _, event in self.store.jobs.events_since(job_id, None, -1) if event.data]
        return [(data["step"], data["train_loss"]) for data in events if "train_loss" in data]

    def left(self, job_id: str) -> list[str]:
        folder = self.store.of_job(job_id)
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    def run(self, act: Callable[[], Awaitable[None]]) -> None:
        """Run a server's runner for as long as `act` takes."""

        async def load(name: str, folder: str) -> None:
            if self.load_error is not None:
                raise self.load_error
            self.when_loaded(name)
            self.loaded[name] = folder

        async def unload(name: str) -> None:
            self.loaded.pop(name, None)

        async def publish(job_id: str, folder: Path, asked: Publication) -> int:
            self.when_published(job_id)
            if self.publish_error is not None:
                raise self.publish_error
            self.published.append((job_id, asked.name, str(folder)))
            return len(self.published)

        def max_tokens(owner: str) -> int | None:
            if owner == "gone":
                raise LookupError
            return 5

        async def run() -> None:
            server = Server(
                load=load,
                unload=unload,
                publish=publish,
                live=lambda _: self.live,
                is_open=lambda: True,
                is_busy=lambda: self.is_busy,
                max_tokens=max_tokens,
            )
            command = (sys.executable, "-m", "tests.support.tuning.scripted_trainer", str(self.folder))
            runner = TuningRunner(self.store, self.storage.folder, self.files, PLAN, server, command)
            running = asyncio.create_task(runner.run())
            try:
                async with asyncio.timeout(LIMIT_S):
                    await act()
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

        asyncio.run(run())

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.01)

    def run_to_end(self, *job_ids: str) -> list[Job]:
        self.run(lambda: self.until(lambda: all(self.find(job_id).is_over for job_id in job_ids)))
        self.store.sweep()  # as the runner at its next look
        return [self.find(job_id) for job_id in job_ids]
