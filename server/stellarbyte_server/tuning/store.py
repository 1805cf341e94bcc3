"""The part of --data-dir that belongs to fine-tuning, as opened by one process of the server.

tuning.sqlite3         jobs and their events
tuning/JOB/            a job's folder: the checked examples (chats.jsonl, validation.jsonl), previous/, the adapter that
                       the result is compared with, run/ with checkpoints, adapter/ and step-N/, the results. After the
                       job only these are left.
tuning/.check-…/       the examples of a check without a job, while it runs
"""

import asyncio
import contextlib
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from stellarbyte_server.batch.index import Index
from stellarbyte_server.config.setting_values import SettingsError
from stellarbyte_server.config.settings import TUNED_PREFIX, TUNING_FOLDER
from stellarbyte_server.tuning.jobs import TUNING_SCHEMA, TUNING_VERSION, Jobs
from stellarbyte_server.tuning.results import ADAPTER_FILES, model_of_checkpoint

INDEX = "tuning.sqlite3"
CHECK_PREFIX = ".check-"  # of folders of checks without a job
_CHECK_KEPT_S = 3600  # of one whose process was killed
CHATS, VALIDATION, ADAPTER, PREVIOUS = "chats.jsonl", "validation.jsonl", "adapter", "previous"


def check_training() -> None:
    """SettingsError unless the libraries of the training are installed."""
    for library in ("accelerate", "yaml"):
        if find_spec(library) is None:
            command = f"{sys.executable} -m pip install 'stellarbyte[train]'"
            raise SettingsError(f"--fine-tuning needs {library}, which is not installed: {command}")


@dataclass(frozen=True)
class TuningStore:
    """Any thread; every method may block on the disk."""

    folder: Path
    jobs: Jobs
    index: Index
    checks: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))  # running without a job
    _owners: dict[str, str] = field(default_factory=dict)  # of models, which never change

    @classmethod
    def open(cls, data_dir: str) -> "TuningStore":
        """Open a folder that this server holds; OSError or ValueError if it cannot be used."""
        folder = Path(data_dir).absolute() / TUNING_FOLDER
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or (folder.parent / INDEX).is_symlink():
            raise ValueError(f"{TUNING_FOLDER} and {INDEX} in {data_dir} must not be links")
        index = Index(folder.parent / INDEX, TUNING_SCHEMA, TUNING_VERSION)
        index.prepare()
        return cls(folder, Jobs(index), index)

    def of_job(self, job_id: str) -> Path:
        return self.folder / job_id

    def adapter(self, job_id: str) -> Path:
        return self.of_job(job_id) / ADAPTER

    def previous(self, job_id: str) -> Path:
        """A copy of the adapter that the result is compared with, if there is one."""
        return self.of_job(job_id) / PREVIOUS

    def keep_previous(self, job_id: str, adapter: Path) -> None:
        """Copy an adapter's files, whole or not at all. OSError."""
        staged = self.of_job(job_id) / f"{PREVIOUS}.part"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(mode=0o700)
        for name in ADAPTER_FILES:
            shutil.copyfile(adapter / name, staged / name)
        staged.rename(self.previous(job_id))

    def checkpoint(self, job_id: str, step: int) -> Path:
        return self.of_job(job_id) / f"step-{step}"

    def owner_of(self, name: str) -> str | None:
        """The owner of a fine-tuned model or of a checkpoint of it, by its name; None: no job has such a model."""
        if not name.startswith(TUNED_PREFIX):
            return None
        model = model_of_checkpoint(name)
        if model not in self._owners and (job := self.jobs.of_model(model)) is not None:
            self._owners[model] = job.owner
        return self._owners.get(model)

    def sweep(self) -> None:
        """Remove all files that belong to no unfinished job and no model."""
        for name in os.listdir(self.folder):
            if name.startswith(CHECK_PREFIX):
                self._sweep_check(self.folder / name)
                continue
            job = self.jobs.find(name)
            if job is None or (job.is_over and job.fine_tuned_model is None):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            elif job.is_over:
                kept = {ADAPTER, *(f"step-{checkpoint.step}" for checkpoint in job.checkpoints)}
                for path in self.of_job(name).iterdir():
                    if path.name not in kept:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()

    @staticmethod
    def _sweep_check(folder: Path) -> None:
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            if folder.stat().st_mtime + _CHECK_KEPT_S < time.time():
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        self.index.close()
