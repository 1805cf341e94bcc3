"""`stellarbyte train tokenizer`: trains a tokenizer and prints what it does with texts that it has not seen."""

import argparse

from rich.console import Console
from rich.table import Table

from stellarbyte.train.config.tokenizer import TrainTokenizer
from stellarbyte.train.config.yaml_file import read_yaml
from stellarbyte.train.tokenizer.report import Report
from stellarbyte.train.tokenizer.stages import train_tokenizer


def run(options: argparse.Namespace) -> int:
    settings = read_yaml(options.file, TrainTokenizer, options.overrides)
    errors = Console(stderr=True)
    with errors.status("Starting") as status:
        report = train_tokenizer(settings, on_stage=status.update)
    console = Console()
    console.print(_table(report))
    console.print(f"Wrote {settings.output}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _table(report: Report) -> Table:
    table = Table(
        *("kind", "texts", "bytes per token", "characters per token", "changed", "unknown"),
        title=f"{report.vocabulary:,} tokens",
        caption="* of texts that tokens were learned from"
        if any(k.is_learned for k in report.kinds.values())
        else None,
    )
    for kind, counted in report.kinds.items():
        table.add_row(
            kind + ("*" if counted.is_learned else ""),
            f"{counted.texts:,}",
            f"{counted.bytes_per_token:.2f}",
            f"{counted.characters_per_token:.2f}",
            f"{counted.changed_texts:,}",
            f"{counted.unknown_tokens:,}",
        )
    return table
