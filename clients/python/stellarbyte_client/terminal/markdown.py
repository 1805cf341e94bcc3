"""Markdown of answers for rich, whole or growing."""

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

# As rich's parser, but with HTML as text: rich omits HTML.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table")

# Colours for dark and light screens.
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
    """The text with control characters replaced by their visible symbols, so that it cannot control the terminal."""
    return _CONTROL.sub(_symbol, text.replace("\r\n", "\n"))


def _symbol(match: re.Match[str]) -> str:
    code = ord(match.group())
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "\ufffd"


def split_blocks(text: str) -> tuple[list[str], str]:
    """Finished blocks of a growing text, and the rest: the block that still grows."""
    starts = [token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.map is not None]
    if len(starts) < 2:
        return [], text
    lines = text.split("\n")
    blocks = ["\n".join(lines[start:end]) for start, end in itertools.pairwise(starts)]
    return blocks, "\n".join(lines[starts[-1] :])


class _Code(CodeBlock):
    """A code block, indented and without a background, for any screen."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(
            code, self.lexer_name, theme="ansi_dark", background_color="default", word_wrap=True, padding=(0, 2)
        )


class _Heading(Heading):
    """A heading, left-aligned at every level."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        del console, options
        self.text.justify = "left"
        yield self.text


class AnswerMarkdown(Markdown):
    """Markdown that keeps the model's line breaks. The text must be `printable`."""

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
        """Omit rich's blank line before a list at the start."""
        parts = super().__rich_console__(console, options)
        return itertools.dropwhile(lambda part: part == Segment.line(), parts)


def _keep_breaks(tokens: Iterable[Token]) -> None:
    for token in tokens:
        if token.type == "softbreak":
            token.type = "hardbreak"
        _keep_breaks(token.children or ())
