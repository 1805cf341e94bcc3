"""The answers of several models to one prompt, side by side."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stellarbyte_client.terminal.conversation import Answer
from stellarbyte_client.terminal.markdown import printable

if TYPE_CHECKING:
    from stellarbyte_client.terminal.answers import Asker

_FRAME_S = 0.1
_NARROW = 60  # columns of a terminal, below which answers stand below each other
MAX_TOKENS = 256


def compare(console: Console, asker: "Asker", models: Sequence[str], prompt: str) -> list[Answer]:
    """Ask all models at once, without sampling, and show their answers while they come; in a pipe, at the end."""
    return asyncio.run(_compare(console, asker, models, prompt))


async def _compare(console: Console, asker: "Asker", models: Sequence[str], prompt: str) -> list[Answer]:
    answers = [Answer() for _ in models]
    question = [{"role": "user", "content": prompt}]
    asked = [{"model": model, "messages": question, "temperature": 0, "max_tokens": MAX_TOKENS} for model in models]
    asking = asyncio.gather(*(asker.ask(request, answer) for request, answer in zip(asked, answers, strict=True)))
    if not console.is_terminal:
        await asking
        for model, answer in zip(models, answers, strict=True):
            console.print(Text(f"{model}:\n{_shown(answer)}\n"))
        return answers
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while not asking.done():
            live.update(_table(console, models, answers), refresh=True)
            await asyncio.wait({asking}, timeout=_FRAME_S)
        live.vertical_overflow = "visible"
        live.update(_table(console, models, answers), refresh=True)
    asking.result()
    return answers


def _table(console: Console, models: Sequence[str], answers: Sequence[Answer]) -> Table:
    shown = [Text(_shown(answer)) for answer in answers]
    if console.width < _NARROW:
        table = Table(box=box.SIMPLE, show_header=False, expand=True)
        for model, text in zip(models, shown, strict=True):
            table.add_row(Text(printable(model), style="bold"))
            table.add_row(text, end_section=True)
        return table
    table = Table(box=box.SIMPLE_HEAD, expand=True)
    for model in models:
        table.add_column(Text(printable(model)), ratio=1, overflow="fold")
    table.add_row(*shown)
    return table


def _shown(answer: Answer) -> str:
    problem = "" if answer.problem is None else f"[{answer.problem}]"
    return "\n".join(part for part in (printable(answer.text).strip(), problem) if part)
