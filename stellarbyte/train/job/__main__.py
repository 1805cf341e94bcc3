"""The process of one job.

It reads its settings (`Job`) as one line of JSON from stdin and writes messages as lines of JSON to stdout: `plan`,
`begun`, `step`, `evaluation`, `saved`, `epoch`, `warning`, `compared`, and at its end one of `finished`, `stopped`
(SIGTERM: the step is finished and saved) and `refused` (about data, memory or run; with one sentence). With `only_plan`
it ends after the plan, or after the refusal of it. Later lines of stdin are `busy` and `idle`: whether requests run on
the server's GPU (`Pace`). It ends when stdin is closed, and another process with the same settings continues from the
last checkpoint, bit for bit.
"""

import contextlib
import os
import resource
import sys
import threading
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import TrainerCallback

from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.native import load_config
from stellarbyte.checkpoint.source import resolve_model
from stellarbyte.lora.peft_format import WEIGHTS_FILE
from stellarbyte.train.callbacks.pace import Pace
from stellarbyte.train.callbacks.report import Messages, Progress
from stellarbyte.train.config.run import LoraRun
from stellarbyte.train.errors import TrainError
from stellarbyte.train.job.comparison import Comparison
from stellarbyte.train.job.settings import MAX_STEPS, Job, needed_memory
from stellarbyte.train.launch import train
from stellarbyte.train.rows import RunData, ShuffledStream
from stellarbyte.train.sources import rows_of_chats, tokenized_chats

NICENESS, NICENESS_OF_PLAN = 19, 10  # somebody waits for a plan, which takes seconds
KEPT_EPOCHS = 2  # adapters after epochs, besides the result
_OF_LIBRARIES = 256 * 2**20  # bytes of memory, for threads and for what they import late
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")


class Refused(Exception):
    """The job cannot run; str() is one sentence for the user, and `about` the kind of the reason."""

    def __init__(self, about: str, message: str) -> None:
        super().__init__(message)
        self.about = about


def main() -> int:
    messages = Messages(os.fdopen(os.dup(sys.stdout.fileno()), "wb"))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # so that output of libraries is not taken for messages
    line = sys.stdin.buffer.readline()
    if not line:
        return 0  # the parent ended first
    idle = threading.Event()
    idle.set()
    threading.Thread(target=_follow_stdin, args=(idle,), daemon=True).start()
    job = Job.model_validate_json(line)
    give_way(job)
    if job.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    run(job, messages, idle)
    return 0


def give_way(job: Job) -> None:
    """Train only in time that no other process wants; threads that are started later inherit it.

    Linux' SCHED_IDLE: a thread of the server that wakes up interrupts such a process at once, which nice 19 does not
    grant. Any user may choose it.
    """
    os.nice(NICENESS_OF_PLAN if job.only_plan else NICENESS)
    if not job.only_plan and hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def run(job: Job, messages: Messages, idle: threading.Event) -> None:
    """Train, and report the end in any case but a fault of this program. `idle` is that of `Pace`."""
    try:
        _run(job, messages, idle)
    except Refused as error:
        messages.send("refused", about=error.about, message=str(error))
    except (TrainError, CheckpointError, OSError) as error:
        messages.send("refused", about="run", message=_without_paths(str(error), job))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in _NO_MEMORY):
            raise
        messages.send("refused", about="memory", message="The training needs more memory than it may use.")


def _run(job: Job, messages: Messages, idle: threading.Event) -> None:
    torch.set_num_threads(job.threads)
    memory = _allowed_memory(job)
    try:
        tokenizer, chats = tokenized_chats(job.base, job.data)
    except TrainError as error:
        raise Refused("data", _without_paths(str(error), job)) from error
    lengths = np.diff(chats["train"].ends, prepend=0)
    num_steps = _checked_steps(job, lengths)
    base = load_config(resolve_model(job.model))
    longest = max(int(np.diff(each.ends, prepend=0).max(initial=0)) for each in chats.values())
    run = job.run(len(lengths), longest, base)
    needed = needed_memory(run, base) + _bytes_of_previous(job)
    batch = min(job.batch, len(lengths))
    order = list(ShuffledStream(len(lengths), num_steps * batch, job.seed))
    tokens = list(accumulate(int(lengths[order[start : start + batch]].sum()) for start in range(0, len(order), batch)))
    messages.send(
        "plan", steps=num_steps, tokens=tokens[-1], batch=batch, learning_rate=run.train.lr, needed_memory=needed
    )
    if needed > memory:
        raise Refused(
            "memory",
            f"The training needs about {needed} bytes of memory, and may use {memory}; shorter chats or a smaller"
            " batch need less.",
        )
    if job.only_plan:
        return
    data = rows_of_chats(run, tokenizer, chats)
    epochs = [-(-epoch * len(lengths) // batch) for epoch in range(1, job.epochs + 1)]
    callbacks: list[TrainerCallback] = [Progress(messages, job.folder, tokens, epochs, KEPT_EPOCHS)]
    if job.device == "cuda":
        callbacks.append(Pace(idle))
    _bound_memory(job, memory)
    _train(job, run, data, callbacks, messages)


def _bytes_of_previous(job: Job) -> int:
    """Of the adapter that is read beside the trained one at the end: in float32, from 16 bits or more."""
    return 0 if job.previous is None else 2 * (job.previous / WEIGHTS_FILE).stat().st_size


def _checked_steps(job: Job, lengths: np.ndarray) -> int:
    num_steps = job.steps(len(lengths))
    if num_steps > MAX_STEPS:
        raise Refused("data", f"The job would have {num_steps} steps; at most {MAX_STEPS} are allowed.")
    num_tokens = job.epochs * int(lengths.sum())
    if job.max_tokens is not None and num_tokens > job.max_tokens:
        raise Refused(
            "data", f"The job would read {num_tokens} tokens in all epochs; at most {job.max_tokens} are allowed."
        )
    return num_steps


def _train(job: Job, run: LoraRun, data: RunData, callbacks: list[TrainerCallback], messages: Messages) -> None:
    comparison = Comparison(messages=messages, previous=job.previous, has_exact_match="exact_match" in job.evaluate)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        outcome = train(
            "lora",
            run,
            data,
            resume=True,
            console=Console(file=nowhere),
            callbacks=callbacks,
            compare=comparison if job.previous is not None or job.evaluate else None,
        )
    if outcome.folder is None:
        messages.send("stopped", step=outcome.step)
        return
    messages.send("finished", step=outcome.step)


def _allowed_memory(job: Job) -> int:
    """Bytes that the training may use. Refused: the GPU is absent or full."""
    if job.device == "cuda":
        if not torch.cuda.is_available():
            raise Refused("memory", "The machine has no NVIDIA GPU that PyTorch can use.")
        free, _ = torch.cuda.mem_get_info()
        memory = int(0.9 * free) if job.memory is None else job.memory
        if memory > free:
            raise Refused("memory", f"The GPU has {free} free bytes, of which the training may use {memory}.")
        return memory
    return _available_memory() // 2 if job.memory is None else job.memory


def _bound_memory(job: Job, memory: int) -> None:
    """From now on, allocating more fails."""
    if job.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(memory / torch.cuda.mem_get_info()[1])
    elif (used := _status_bytes("/proc/self/status", "VmData")) is not None:
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        allowed = used + memory + _OF_LIBRARIES
        resource.setrlimit(resource.RLIMIT_DATA, (allowed if most < 0 else min(allowed, most), most))


def _available_memory() -> int:
    """Bytes that can be used without swapping, of the machine and of the control group (containers)."""
    available = _status_bytes("/proc/meminfo", "MemAvailable")
    if available is None:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (allowed := limit.read_text().strip()) != "max":
        available = min(available, int(allowed) - int(used.read_text()))
    return max(0, available)


def _status_bytes(file: str, field: str) -> int | None:
    """A field of a file of /proc, which counts in KiB; None: there is no such file."""
    try:
        lines = Path(file).read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _without_paths(message: str, job: Job) -> str:
    """The user knows the files by their roles, and no folders of this machine."""
    names = {job.validation: "validation_file", job.chats: "training_file", job.template: "the chat template"}
    for path, name in names.items():
        if path is not None:
            message = message.replace(str(path), name)
    return message.replace(f"{job.folder}/run/", "").replace(f"{job.folder}/", "")


def _follow_stdin(idle: threading.Event) -> None:
    for line in sys.stdin.buffer:
        if line == b"busy\n":
            idle.clear()
        elif line == b"idle\n":
            idle.set()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
