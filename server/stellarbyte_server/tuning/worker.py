"""The process that trains one job: `python -m stellarbyte.train.job`, of which only its messages are known here."""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from stellarbyte_server.import_path import safe_environment

COMMAND = (sys.executable, "-m", "stellarbyte.train.job")
SAVE_LIMIT_S = 10.0  # for the step that runs and its checkpoint


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the process reads."""

    folder: str
    model: str
    chats: str
    validation: str | None
    template: str | None
    seed: int
    epochs: int
    batch: int
    learning_rate_multiplier: float
    rank: int
    context: int
    device: str
    threads: int
    memory: int | None
    max_tokens: int | None
    only_plan: bool = False
    previous: str | None = None
    evaluate: tuple[str, ...] = ()


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """What the process writes; which fields it has depends on `type`."""

    type: str
    step: int = 0
    steps: int = 0
    tokens: int = 0
    batch: int = 0
    learning_rate: float = 0.0
    needed_memory: int = 0
    train_loss: float = 0.0
    valid_loss: float = 0.0
    figures: dict[str, float] = {}
    about: str = ""
    message: str = ""


ENDS = ("finished", "stopped", "refused")


@dataclass(frozen=True)
class Worker:
    """A running process. It ends whenever this process does, because its stdin is closed then."""

    process: Process

    @classmethod
    async def start(cls, settings: Settings, command: Sequence[str] = COMMAND) -> "Worker":
        """OSError if there can be no other process."""
        environment = {
            **safe_environment(os.environ),
            "OMP_NUM_THREADS": str(settings.threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # its threads must not keep cores busy that the engine needs
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        # A process group of its own: Ctrl-C in the terminal must reach only the server.
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, env=environment, process_group=0
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(settings) + b"\n")
        with contextlib.suppress(ConnectionError):  # already dead, which `read` reports
            await process.stdin.drain()
        return cls(process)

    async def read(self) -> Message | None:
        """The next message; None: there are no more."""
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        return msgspec.json.decode(line, type=Message) if line.endswith(b"\n") else None

    def tell(self, *, is_busy: bool) -> None:
        """Whether requests run, to which a job on the same GPU gives way."""
        assert self.process.stdin is not None
        if not self.process.stdin.is_closing():
            self.process.stdin.write(b"busy\n" if is_busy else b"idle\n")

    def save_and_end(self) -> None:
        """Finish the step and save."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    async def ended(self) -> int:
        """Wait for the end; returns the status as of subprocess."""
        return await self.process.wait()

    async def stop(self) -> None:
        """Let it save for a while, then end it in any case."""
        self.save_and_end()
        try:
            async with asyncio.timeout(SAVE_LIMIT_S):
                await self.process.wait()
        except TimeoutError:
            self.kill()
            await self.process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
