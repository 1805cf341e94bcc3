"""An answer that grows on a screen: whatever its length, what is there in the end is what is shown of it at once."""

import random
import re
from collections.abc import Iterator

import pyte
import pytest
from rich.console import Console

from stellarbyte_client.terminal.answer_view import AnswerView
from stellarbyte_client.terminal.markdown import THEME, AnswerMarkdown, printable, split_blocks

ROWS, COLUMNS = 12, 40
WORDS = "Paris is the capital of France and **its** largest city, on the *Seine*. "
CODE = "".join(f"    total += {i}  # step {i}\n" for i in range(20))
ANSWERS = {
    "short": "The capital of France is Paris.",
    "paragraph higher than the screen": WORDS * 10,
    "list higher than the screen": "\n".join(f"{i}. Item {i}: {WORDS}" for i in range(1, 12)),
    "code higher than the screen": f"Here is a function:\n\n```python\ndef count():\n{CODE}```\n\nIt counts.",
    "table": "| city | people |\n|---|---|\n" + "".join(f"| City {i} | {i * 1000} |\n" for i in range(20)) + "\nAll.",
    "everything": f"# Title\n\nText\nin two lines.\n\n- a\n- b\n\n> said\n\n## Next\n\n{WORDS * 3}\n\n`x < y`\n",
    "HTML": "<b>bold</b> is <i>no</i> Markdown\n\n<div>\nstays\n</div>\n",
    "wide characters": "巴黎是法国的首都。" * 40 + "\n\n" + "👍 " * 30,
}


class Screen:
    """A terminal with more lines above it, and a rich console that writes to it."""

    def __init__(self) -> None:
        self._screen = pyte.HistoryScreen(COLUMNS, ROWS, history=10_000)
        self._stream = pyte.Stream(self._screen)
        self.writes: list[str] = []
        self.console = Console(
            file=self, force_terminal=True, width=COLUMNS, height=ROWS, theme=THEME, highlight=False,
            color_system="standard", legacy_windows=False,
        )  # type: ignore[arg-type]  # fmt: skip

    def write(self, text: str) -> int:
        self.writes.append(text)
        self._stream.feed(text.replace("\n", "\r\n"))  # as terminals do
        return len(text)

    def flush(self) -> None:
        pass

    @property
    def text(self) -> str:
        gone = ["".join(line[x].data for x in range(COLUMNS)) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*gone, *self._screen.display]).strip("\n")


def at_once(text: str) -> str:
    screen = Screen()
    screen.console.print(AnswerMarkdown(text), end="")
    return screen.text


def growing(text: str) -> Iterator[str]:
    """Its beginnings, each a bit longer than the one before."""
    sizes, end = random.Random(0), 0
    while end < len(text):
        yield text[:end]
        end += sizes.choice((1, 2, 3, 20, 60))


@pytest.mark.parametrize("name", ANSWERS)
def test_the_end_is_as_if_shown_at_once(name: str) -> None:
    text, screen = ANSWERS[name], Screen()
    with AnswerView(screen.console, is_plain=False) as view:
        for part in growing(text):
            view.show(part)
        view.finish(text)
    assert screen.text == at_once(text)


@pytest.mark.parametrize("name", ANSWERS)
def test_plain_answers_are_shown_as_they_are(name: str) -> None:
    text, screen = ANSWERS[name], Screen()
    with AnswerView(screen.console, is_plain=True) as view:
        for part in growing(text):
            view.show(part)
        view.finish(text)
    assert re.sub(r"\s", "", screen.text) == re.sub(r"\s", "", text)


@pytest.mark.parametrize("name", ["short", "everything"])
@pytest.mark.parametrize("is_plain", [False, True])
def test_reasoning_stands_above_the_answer_and_its_newest_words_are_in_sight(name: str, is_plain: bool) -> None:
    reasoning, text, screen = WORDS * 20 + "\n\n" + CODE, ANSWERS[name], Screen()
    with AnswerView(screen.console, is_plain=is_plain) as view:
        for part in growing(reasoning):
            view.show("", part)
            assert not part.strip() or part.split()[-1] in screen.text
        for part in growing(text):
            view.show(part, reasoning)
        view.finish(text, reasoning)
    assert re.sub(r"\s", "", screen.text).startswith(re.sub(r"\s", "", reasoning))
    if not is_plain:
        assert screen.text.endswith("\n\n" + at_once(text))


def test_reasoning_without_an_answer_stays() -> None:
    screen = Screen()
    with AnswerView(screen.console, is_plain=False) as view:
        view.show("", "Hm, which")
        view.finish("", "Hm, which city?\n")
    assert screen.text == "Hm, which city?"


def test_the_newest_words_are_always_in_sight_and_what_is_finished_stays_untouched() -> None:
    text, screen = ANSWERS["code higher than the screen"], Screen()
    with AnswerView(screen.console, is_plain=False) as view:
        for part in growing(text):
            before = len(screen.writes)
            view.show(part)
            assert len(screen.writes) - before <= 1  # nobody sees half of a change
            step = re.findall(r"# step (\d+)\n", part)
            assert not step or f"# step {step[-1]}" in screen.text
    assert sum("Here is a function" in write for write in screen.writes) < 6


@pytest.mark.parametrize("name", ANSWERS)
def test_blocks_once_finished_never_change(name: str) -> None:
    """So that they can be printed for good."""
    text = ANSWERS[name]
    blocks, rest = split_blocks(text)
    assert "".join(line for block in [*blocks, rest] for line in block.split("\n")) == text.replace("\n", "")
    for part in growing(text):
        finished, _ = split_blocks(part)
        assert finished == blocks[: len(finished)]


def test_an_answer_commands_no_terminal() -> None:
    evil = "before\x1b]0;title\x07\x1b[2J\x9b2Jafter\x00\r\x7f"
    screen = Screen()
    with AnswerView(screen.console, is_plain=False) as view:
        view.show(evil)
        view.finish(evil)
    assert "before␛]0;title␇␛[2J\ufffd2Jafter␀␍␡" in screen.text
    assert printable("a\tb\r\nc\n") == "a\tb\nc\n"
