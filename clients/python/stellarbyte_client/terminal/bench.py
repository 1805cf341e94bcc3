"""`stellarbyte bench`: measures a server with several numbers of streams; shows a table, a chart and JSON."""

import asyncio
import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from stellarbyte_client.address import GENERATION_TIMEOUT_S, Address
from stellarbyte_client.terminal.connection import CommandFailed, Connection, check_model, default_model, models_of
from stellarbyte_client.terminal.load import LoadFigures, LoadGenerator, Outcome, Work
from stellarbyte_client.terminal.markdown import printable

_FEWEST_REQUESTS = 8
_WARM_UP_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    connection: Connection
    models: Sequence[str] | None  # None: the served model
    streams: Sequence[int]
    requests: int | None  # for each number of streams; None: twice that, at least 8
    prompt_tokens: int
    max_tokens: int
    json_file: Path | None

    def requests_of(self, streams: int) -> int:
        return max(_FEWEST_REQUESTS, 2 * streams) if self.requests is None else self.requests

    @property
    def command(self) -> str:
        """The command line of this benchmark, without keys."""
        words = ["stellarbyte", "bench", "--url", self.connection.url, "--streams", ",".join(map(str, self.streams))]
        if self.models is not None:
            words += ["--model", ",".join(self.models)]
        if self.requests is not None:
            words += ["--requests", str(self.requests)]
        words += ["--prompt-tokens", str(self.prompt_tokens), "--max-tokens", str(self.max_tokens)]
        return shlex.join(words)


@dataclass(frozen=True, kw_only=True)
class Row(LoadFigures):
    """The figures of one number of streams, without the warm-up's requests."""

    streams: int
    requests: int
    warm_up_requests: int
    warm_up_tokens: int


def make_row(streams: int, outcomes: Sequence[Outcome], wall_s: float, warm_up: Sequence[Outcome]) -> Row:
    return Row(
        **vars(LoadFigures.of(outcomes, wall_s)),
        streams=streams,
        requests=len(outcomes),
        warm_up_requests=len(warm_up),
        warm_up_tokens=sum(outcome.tokens for outcome in warm_up),
    )


def bench(settings: BenchSettings) -> bool:
    """Measure and show; returns whether all requests succeeded. StellarByteError if measuring is impossible."""
    for streams in settings.streams:
        if settings.requests_of(streams) < streams:
            raise CommandFailed(
                f"--requests must be at least the number of streams; {settings.requests} is less than {streams}."
            )
    with settings.connection.client() as client:
        known = models_of(client)
        server_version = client.version()
    models = [default_model(known).id] if settings.models is None else settings.models
    for model in models:
        check_model(model, known)
    file = None if settings.json_file is None else _open(settings.json_file)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(
        f"{', '.join(models)} at {settings.connection.base_url}: {settings.prompt_tokens} prompt tokens,"
        f" {settings.max_tokens} tokens of answer, times in ms\n",
        soft_wrap=True,
    )
    rows: list[Row] = []
    try:
        asyncio.run(_measure(settings, models, console, rows))
    finally:  # also rows measured before Ctrl-C
        if file is not None:
            _write(file, settings, models, server_version, rows)
    return not any(row.errors for row in rows)


async def _measure(settings: BenchSettings, models: Sequence[str], console: Console, rows: list[Row]) -> None:
    """Add a row for each number of streams; shows complete rows even if interrupted."""
    work = Work(models=models, prompt_tokens=settings.prompt_tokens, max_tokens=settings.max_tokens)
    short = replace(work, max_tokens=min(work.max_tokens, _WARM_UP_TOKENS))
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(complete_style="cyan", finished_style="cyan"),
        MofNCompleteColumn(),
        console=console,
    )
    connection = settings.connection
    address = Address.of(connection.base_url, connection.api_key, None, GENERATION_TIMEOUT_S)
    load = LoadGenerator(address)
    loop = asyncio.get_running_loop()
    try:
        with Live(progress, console=console, transient=True) as live:
            for streams in settings.streams:
                requests = settings.requests_of(streams)
                task = progress.add_task(f"{streams} streams", total=requests)
                live.update(Group(_table(rows), "", progress) if rows else progress, refresh=True)
                warm_up = await load.run(short, streams=streams, requests=range(streams))
                started_s = loop.time()
                on_end = partial(progress.advance, task)
                outcomes = await load.run(work, streams=streams, requests=range(requests), on_end=on_end)
                rows.append(make_row(streams, outcomes, loop.time() - started_s, warm_up))
                progress.remove_task(task)
    finally:
        if rows:
            console.print(_table(rows), "", _chart(rows), *_errors(rows), sep="\n")


def _table(rows: Sequence[Row]) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for heading in ("streams", "requests", "errors", "tokens/s", "TTFT p50", "p99", "ITL p50", "p99"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        errors = Text(str(row.num_errors), style="red" if row.errors else "")
        times = [*_cells(row.ttft_ms), *_cells(row.itl_ms)]
        table.add_row(str(row.streams), str(row.requests), errors, f"{row.tokens_per_s:.1f}", *times)
    return table


def _cells(times_ms: list[float | None]) -> list[str]:
    return ["–" if time_ms is None else f"{time_ms:.1f}" for time_ms in times_ms]


def _chart(rows: Sequence[Row]) -> RenderableType:
    """Tokens per second by number of streams."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right")
    grid.add_column(width=50)
    grid.add_column()
    most = max(row.tokens_per_s for row in rows)
    for row in rows:
        bar = Bar(most or 1.0, 0, row.tokens_per_s, color="cyan")
        grid.add_row(
            f"{row.streams} {'stream' if row.streams == 1 else 'streams'}", bar, f"{row.tokens_per_s:.0f} tokens/s"
        )
    return grid


def _errors(rows: Sequence[Row]) -> list[Text]:
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(row.errors)
    return [Text(f"{count} × {printable(message)}", style="red") for message, count in counts.most_common()]


def _open(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise CommandFailed(f"{path} cannot be written: {error.strerror}.") from None


def _write(file: TextIO, settings: BenchSettings, models: Sequence[str], server_version: str, rows: list[Row]) -> None:
    content: dict[str, Any] = {
        "command": settings.command,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "server_version": server_version,
        "models": list(models),
        "prompt_tokens": settings.prompt_tokens,
        "max_tokens": settings.max_tokens,
        "rows": [asdict(row) for row in rows],
    }
    try:
        with file:
            file.write(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise CommandFailed(f"{settings.json_file} cannot be written: {error.strerror}.") from None
