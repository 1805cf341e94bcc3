"""`stellarbyte train prepare`: texts to token shards, with the progress on stderr and a table of the result."""

import argparse

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from stellarbyte.train.config.prepare import Prepare
from stellarbyte.train.config.yaml_file import read_yaml
from stellarbyte.train.data.files import files_of
from stellarbyte.train.data.prepare import prepare
from stellarbyte.train.data.shards import ShardIndex
from stellarbyte.train.data.sources import total_bytes


def run(options: argparse.Namespace) -> int:
    settings = read_yaml(options.file, Prepare, options.overrides)
    columns = (
        TextColumn("Preparing"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total_bytes(files_of(settings.sources)), documents=0, tokens=0)

        def show(read: int, documents: int, tokens: int) -> None:
            progress.update(task, completed=read, documents=documents, tokens=tokens)

        index = prepare(settings, is_resumed=options.resume, on_progress=show)
        progress.update(task, completed=progress.tasks[0].total)
    _print(settings, index)
    return 0


def _print(settings: Prepare, index: ShardIndex) -> None:
    table = Table("split", "documents", "tokens", "bytes of text", "bytes per token")
    for split, counted in index.splits.items():
        ratio = f"{counted.text_bytes / counted.tokens:.2f}" if counted.tokens else "-"
        table.add_row(split, f"{counted.documents:,}", f"{counted.tokens:,}", f"{counted.text_bytes:,}", ratio)
    console = Console()
    console.print(table)
    licenses = ", ".join(sorted({source.license for source in index.sources}))
    console.print(
        f"fingerprint {index.fingerprint}\nlicenses {licenses}", soft_wrap=True, highlight=False, markup=False
    )
    console.print(f"Wrote {settings.output}", soft_wrap=True, highlight=False, markup=False)
