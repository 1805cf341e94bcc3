"""Shows a growing answer of any length without flicker.

Finished blocks of Markdown are printed once; only the last block is redrawn. Of a block higher than the screen, the end
is shown until it is finished.
"""

from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.spinner import Spinner
from rich.text import Text

from stellarbyte_client.terminal.markdown import AnswerMarkdown, printable, split_blocks


class AnswerView:
    """Use in a `with` statement; call `show` with the whole answer so far for each update, and `finish` at the end.

    The text is rendered as Markdown, or with `is_plain` unchanged; the reasoning before it is dim and unchanged.
    """

    def __init__(self, console: Console, *, is_plain: bool) -> None:
        self._console = console
        self._is_plain = is_plain
        self._num_printed = 0  # characters of the text printed finally
        self._num_reasoning_printed = 0
        self._reasoning_ended = False
        waiting = Spinner("dots", Text("Ctrl-C stops", style="dim"), style="dim")
        self._live = Live(
            waiting,
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, text: str, reasoning: str = "") -> None:
        text = printable(text)
        rest = text[self._num_printed :]
        with self._console:  # in one write
            self._show_reasoning(printable(reasoning), is_whole=bool(text.strip()))
            if rest.strip():
                blocks, rest = self._split(rest)
                self._num_printed = len(text) - len(rest)
                for block in blocks:
                    self._print(block)
                    if not self._is_plain:
                        self._console.print()
                self._live.update(_End(self._rendered(rest)))
            self._live.refresh()

    def finish(self, text: str, reasoning: str = "") -> None:
        """Print the rest of the answer."""
        rest = printable(text)[self._num_printed :]
        with self._console:
            self._live.update(Text())
            self._live.refresh()
            self._show_reasoning(printable(reasoning), is_whole=True, is_last=not text.strip())
            if rest.strip():
                self._print(rest.rstrip("\n"))

    def _show_reasoning(self, reasoning: str, *, is_whole: bool, is_last: bool = False) -> None:
        """Print its finished lines and show the last one; print all of a whole one, once."""
        if self._reasoning_ended or not reasoning.strip():
            return
        rest = reasoning[self._num_reasoning_printed :]
        finished, newline, rest = (rest.rstrip("\n"), "\n", "") if is_whole else rest.rpartition("\n")
        self._num_reasoning_printed = len(reasoning) - len(rest)
        if newline and finished:
            self._console.print(Text(finished, style="dim"))
        if is_whole:
            self._reasoning_ended = True
            if not is_last:
                self._console.print()
        else:
            self._live.update(_End(Text(rest, style="dim")))

    def _split(self, text: str) -> tuple[list[str], str]:
        if not self._is_plain:
            return split_blocks(text)
        finished, newline, rest = text.rpartition("\n")
        return ([finished] if newline else []), rest

    def _print(self, block: str) -> None:
        self._console.print(self._rendered(block), end="\n" if self._is_plain else "")

    def _rendered(self, block: str) -> RenderableType:
        return Text(block) if self._is_plain else AnswerMarkdown(block)


class _End:
    """The last lines of a renderable, one fewer than the screen's height."""

    def __init__(self, content: RenderableType) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._content, options, pad=False)
        for line in lines[-(console.size.height - 1) :]:
            yield from line
            yield Segment.line()
