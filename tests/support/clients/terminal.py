"""A program in a terminal of its own: what is typed goes in, and the screen is read as a person sees it."""

import itertools
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pyte
from rich.style import Style
from rich.text import Text

from tests.support.servers.server_process import ROOT

LIMIT_S = 30.0
_BRACKETED_PASTE = 2004 << 5  # as pyte keeps private modes
ENTER, ESCAPE, TAB, UP, ALT_ENTER = "\r", "\x1b", "\t", "\x1b[A", "\x1b\r"
CTRL_C, CTRL_D, CTRL_R = "\x03", "\x04", "\x12"


class Terminal:
    """`command` is what follows `stellarbyte`; use in a `with` statement. `home` takes the place of the user's own."""

    def __init__(self, *command: str, home: Path, rows: int = 24, columns: int = 140, **environment: str) -> None:
        self._screen = _Screen(columns, rows, self.type)
        self._stream = pyte.ByteStream(self._screen)
        # pytest-xdist's processes are told of a size that is not this terminal's.
        own = ("STELLARBYTE_", "COLUMNS", "LINES")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        self._child = pexpect.spawn(
            sys.executable,
            ["-m", "stellarbyte.cli.main", *command],
            cwd=str(ROOT),
            dimensions=(rows, columns),
            env=inherited | {"HOME": str(home), "XDG_STATE_HOME": str(home / "state"), "TERM": "xterm-256color"}
            | environment,
            timeout=LIMIT_S,
        )  # fmt: skip
        self.raw = b""  # everything that the program has written

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self._child.close(force=True)

    def type(self, keys: str | bytes) -> None:
        self._child.send(keys)

    def paste(self, text: str) -> None:
        """As terminals do: with a mark on both sides if the program has asked for that."""
        is_marked = _BRACKETED_PASTE in self._screen.mode
        self.type(f"\x1b[200~{text}\x1b[201~" if is_marked else text)

    @property
    def lines(self) -> list[str]:
        """The screen."""
        return [line.rstrip() for line in self._screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.lines).rstrip()

    @property
    def scrolled_text(self) -> str:
        """What has gone out of sight at the top, and the screen."""
        gone = ["".join(line[x].data for x in range(self._screen.columns)) for line in self._screen.history.top]
        return "\n".join([line.rstrip() for line in gone] + self.lines).rstrip()

    def drawn(self) -> Text:
        """The screen in its colours, down to its last line with text."""
        drawn = Text()
        for y in range(len(self.text.splitlines())):
            cells = [self._screen.buffer[y][x] for x in range(self._screen.columns)]
            for style, alike in itertools.groupby(cells, _style):
                drawn.append("".join(cell.data for cell in alike), style)
            drawn.append("\n")
        drawn.rstrip()
        return drawn

    def wait_for(self, pattern: str, limit_s: float = LIMIT_S) -> "Terminal":
        """Go on reading until a regular expression is found on the screen."""
        deadline_s = time.monotonic() + limit_s
        while not re.search(pattern, self.text, re.MULTILINE):
            if time.monotonic() > deadline_s or not self._read():
                raise AssertionError(f"{pattern!r} does not appear on the screen:\n{self.text}")
        return self

    def wait_end(self) -> int:
        """The exit status, after everything was read."""
        deadline_s = time.monotonic() + LIMIT_S
        while self._read():
            if time.monotonic() > deadline_s:
                raise AssertionError(f"the program does not end:\n{self.text}")
        self._child.wait()
        return self._child.exitstatus if self._child.exitstatus is not None else -self._child.signalstatus

    def _read(self) -> bool:
        """Take what there is within a tenth of a second; False at the program's end."""
        try:
            written = self._child.read_nonblocking(65536, timeout=0.1)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += written
        self._stream.feed(written.replace(b"\x1b[2m", b"\x1b[90m"))  # pyte knows no dim text
        return True


def _style(cell: pyte.screens.Char) -> Style:
    return Style(
        color=_color(cell.fg),
        bgcolor=_color(cell.bg),
        bold=cell.bold,
        italic=cell.italics,
        underline=cell.underscore,
        reverse=cell.reverse,
    )


def _color(name: str) -> str | None:
    """rich's name of one of pyte's colours."""
    if name == "default":
        return None
    if re.fullmatch("[0-9a-f]{6}", name):
        return f"#{name}"
    return name.replace("brown", "yellow").replace("bright", "bright_")


class _Screen(pyte.HistoryScreen):
    """pyte knows what to answer when a program asks where the cursor is, and leaves sending it to us."""

    def __init__(self, columns: int, rows: int, answer: Callable[[str], None]) -> None:
        super().__init__(columns, rows, history=10_000)
        self._answer = answer

    def write_process_input(self, data: str) -> None:
        self._answer(data)
