"""The `stellarbyte` command run in this process, which has imported already what each start would import anew."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from stellarbyte.cli.main import main
from tests.support.servers.server_process import ServerProcess


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


class Command:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Result:
        self._capsys.readouterr()
        status = main(list(arguments))
        return Result(status, *self._capsys.readouterr())


@dataclass
class Adapted:
    server: ServerProcess
    folder: Path  # --adapter-dir, with the adapters a0 and a1 of a tiny model
