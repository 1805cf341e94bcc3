"""Answers in Markdown as rich shows them, whole or as they grow."""

import itertools
import re
from collections.abc import Iterable
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement
from rich.segment import Segment
from rich.syntax import Syntax
from rich.theme import Theme

# As rich parses, but what looks like HTML is text: rich leaves HTML out.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table")

# Colours that can be read on dark and on light screens.
THEME = Theme(
    {
        "markdown.code": "cyan",
        "markdown.h1": "bold underline",
        "markdown.h2": "bold underline",
        "markdown.h3": "bold",
        "markdown.h4": "bold italic",
        "markdown.block_quote": "italic",
    }
)

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """The text without what would command a terminal: control characters show as themselves do in tables of codes."""
    return _CONTROL.sub(_symbol, text.replace("\r\n", "\n"))


def _symbol(match: re.Match[str]) -> str:
    code = ord(match.group())
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "\ufffd"


def split_blocks(text: str) -> tuple[list[str], str]:
    """Blocks of a growing text that nothing written after them can change, and the rest: the block that still grows."""
    starts = [token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.map is not None]
    if len(starts) < 2:
        return [], text
    lines = text.split("\n")
    blocks = ["\n".join(lines[start:end]) for start, end in itertools.pairwise(starts)]
    return blocks, "\n".join(lines[starts[-1] :])


class _Code(CodeBlock):
    """Indented and without a background, so that it looks at home on any screen."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(
            code, self.lexer_name, theme="ansi_dark", background_color="default", word_wrap=True, padding=(0, 2)
        )


class _Heading(Heading):
    """On the left, whatever its level."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        del console, options
        self.text.justify = "left"
        yield self.text


class AnswerMarkdown(Markdown):
    """Markdown that keeps line breaks where the model wrote them. The text must be `printable`."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = Markdown.elements | {
        "fence": _Code,
        "code_block": _Code,
        "heading_open": _Heading,
    }

    def __init__(self, text: str) -> None:
        super().__init__("")
        self.parsed = _PARSER.parse(text)
        _keep_breaks(self.parsed)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Without the blank line that rich puts before a list that is the first block."""
        parts = super().__rich_console__(console, options)
        return itertools.dropwhile(lambda part: part == Segment.line(), parts)


def _keep_breaks(tokens: Iterable[Token]) -> None:
    for token in tokens:
        if token.type == "softbreak":
            token.type = "hardbreak"
        _keep_breaks(token.children or ())
