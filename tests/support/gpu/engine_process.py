"""An engine in a process of its own, for tests of several ranks: a process has one group of ranks in its life, and ends
at once, since a group that has captured graphs may wait forever when it is destroyed.

Run as `python -m tests.support.gpu.engine_process JOB ANSWERS`, by `run_engine`.
"""

import logging
import subprocess
import sys
from pathlib import Path

import msgspec

from benchmarks.support.exits import run_and_exit
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.protocol.messages import Delta, merged
from stellarbyte_server.protocol.request import GenerationRequest

LIMIT_S = 600


class Job(msgspec.Struct):
    settings: EngineSettings
    batches: list[list[GenerationRequest]]  # one after another


class Answers(msgspec.Struct):
    batches: list[list[Delta]]
    log: list[str]  # lines of the engine


def run_engine(folder: Path, settings: EngineSettings, *batches: list[GenerationRequest]) -> Answers:
    """The answers to batches of requests; `folder` is for files of this call."""
    job, answers = folder / "job.msgpack", folder / "answers.msgpack"
    job.write_bytes(msgspec.msgpack.encode(Job(settings, list(batches))))
    command = [sys.executable, "-m", "tests.support.gpu.engine_process", str(job), str(answers)]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=LIMIT_S, check=False)
    assert ended.returncode == 0, ended.stderr
    return msgspec.msgpack.decode(answers.read_bytes(), type=Answers)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _run(job: Job) -> Answers:
    from stellarbyte_server.engine.start.load import build_core
    from tests.support.engines.engine_core import drain

    log = _Lines()
    logger = logging.getLogger("server.engine")
    logger.setLevel(logging.INFO)
    logger.addHandler(log)
    core, _ = build_core(job.settings)
    found = []
    for requests in job.batches:
        said = drain(core, *requests, limit_s=300)
        found.append([merged([item for item in said[r.request_id] if isinstance(item, Delta)]) for r in requests])
        while core.prepare():  # the next batch runs what this one lacked, and graphs
            pass
    return Answers(found, log.lines)


def main() -> None:
    job, answers = map(Path, sys.argv[1:])
    answers.write_bytes(msgspec.msgpack.encode(_run(msgspec.msgpack.decode(job.read_bytes(), type=Job))))


if __name__ == "__main__":
    run_and_exit(main)
