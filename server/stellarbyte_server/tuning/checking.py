"""Checks what a job is made of before anything is trained: its files line by line, then its size by a process."""

import asyncio
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stellarbyte_server.batch.files import Files
from stellarbyte_server.tuning.examples import Problem, Template, check_examples
from stellarbyte_server.tuning.jobs import Hyperparameters
from stellarbyte_server.tuning.plan import Plan, chosen
from stellarbyte_server.tuning.store import CHATS, CHECK_PREFIX, VALIDATION, TuningStore
from stellarbyte_server.tuning.worker import COMMAND, Message, Worker

PLAN_LIMIT_S = 300.0  # for a process that only plans; the largest files take minutes to tokenize
_PLACE = re.compile(r"(training_file|validation_file)(?:, line (\d+))?: (.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The files of a job or of a check: ids, the validation file's may be None; whose they are."""

    owner: str
    training_file: str
    validation_file: str | None


@dataclass(frozen=True, kw_only=True)
class CheckedFiles:
    """The number of examples by parameter, and the problems of the first file that has any."""

    num_examples: dict[str, int]
    param: str = ""  # of the file with problems
    problems: Sequence[Problem] = ()


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a job would be. With problems, what is known of it; `plan` then has the steps, tokens and memory, or not."""

    num_examples: dict[str, int]
    hyperparameters: Hyperparameters
    plan: Message | None = None
    param: str | None = None
    problems: Sequence[Problem] = ()


class NoForecast(Exception):
    """The process did not answer; str() is one sentence."""


def check_files(files: Files, examples: Examples, folder: Path, template: Template) -> CheckedFiles:
    """Check every line, and write the chats that can be trained into `folder`. OSError."""
    numbers: dict[str, int] = {}
    for param, file_id, name in (
        ("training_file", examples.training_file, CHATS),
        ("validation_file", examples.validation_file, VALIDATION),
    ):
        if file_id is None:
            continue
        numbers[param], problems = _check_file(files, examples.owner, file_id, folder / name, template)
        if problems:
            return CheckedFiles(num_examples=numbers, param=param, problems=problems)
    return CheckedFiles(num_examples=numbers)


def _check_file(
    files: Files, owner: str, file_id: str, target: Path, template: Template
) -> tuple[int, Sequence[Problem]]:
    file = files.find(owner, file_id)
    try:
        if file is None:
            raise FileNotFoundError
        with files.open(file) as content, open(target, "xb", buffering=0) as normalized:
            return check_examples(content, normalized, template)
    except FileNotFoundError:
        return 0, [Problem(None, "The file no longer exists.")]


async def forecast(
    store: TuningStore,
    files: Files,
    plan: Plan,
    examples: Examples,
    asked: Hyperparameters,
    *,
    max_tokens: int | None,
    command: Sequence[str] = COMMAND,
) -> Forecast:
    """Check the examples as a job would, and have a process count tokens, steps and memory. OSError, NoForecast."""
    folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix=CHECK_PREFIX, dir=store.folder))
    try:
        checked = await asyncio.to_thread(check_files, files, examples, folder, plan.shown)
        number = checked.num_examples["training_file"]
        if checked.problems:
            return Forecast(
                num_examples=checked.num_examples,
                hyperparameters=asked,
                param=checked.param,
                problems=checked.problems,
            )
        hyperparameters = chosen(asked, number)
        settings = plan.settings(
            folder,
            hyperparameters,
            seed=0,
            has_validation=examples.validation_file is not None,
            max_tokens=max_tokens,
            only_plan=True,
        )
        worker = await Worker.start(settings, command)
        try:
            async with asyncio.timeout(PLAN_LIMIT_S):
                planned, refused = await _answers(worker)
        except TimeoutError:
            raise NoForecast(f"The check of the files took longer than {PLAN_LIMIT_S:.0f} s.") from None
        finally:
            worker.kill()
            await worker.ended()
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    param, problem = (None, None) if refused is None else placed(refused)
    return Forecast(
        num_examples=checked.num_examples,
        hyperparameters=hyperparameters,
        plan=planned,
        param=param,
        problems=[] if problem is None else [problem],
    )


async def _answers(worker: Worker) -> tuple[Message | None, Message | None]:
    """The plan and the refusal of a process, of which one may be absent; NoForecast if both are."""
    planned: Message | None = None
    while (message := await worker.read()) is not None:
        if message.type == "plan":
            planned = message
        elif message.type == "refused":
            return planned, message
    if planned is None:
        raise NoForecast("The process that counts the tokens ended unexpectedly.")
    return planned, None


def placed(refused: Message) -> tuple[str | None, Problem]:
    """The parameter that a refusal is about, and the refusal as a problem of its line."""
    if refused.about != "data":
        return None, Problem(None, refused.message)
    match = _PLACE.fullmatch(refused.message)
    if match is None:
        return "training_file", Problem(None, refused.message)
    return match[1], Problem(None if match[2] is None else int(match[2]), match[3])
