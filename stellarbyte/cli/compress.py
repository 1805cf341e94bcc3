"""`stellarbyte compress`: write a smaller model, and show how much worse it is."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tokenizers import Tokenizer

from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.info import size
from stellarbyte.checkpoint.native import load_model
from stellarbyte.checkpoint.progress import ProgressBar
from stellarbyte.checkpoint.source import resolve_model
from stellarbyte.checkpoint.staging import refuse_existing
from stellarbyte.compress import CompressError, Pruning, Quantization, Report, Texts, compress, own_answers, read_texts

FAILURES = (CheckpointError, CompressError)

_KINDS = {("4", "int"): "int4", ("8", "int"): "int8", ("8", "float"): "fp8"}


def run(options: argparse.Namespace) -> int:
    target = Path(options.target)
    refuse_existing(target)
    quantization, pruning = _quantization(options), _pruning(options.prune)
    source = resolve_model(options.model, ProgressBar("Converting"))
    console = Console(stderr=True)
    texts = _texts(source, options, console)
    columns = (TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, object] = {}

        def step(what: str, done: int, total: int) -> None:
            task = tasks.setdefault(what, None)
            if task is None:
                task = tasks[what] = progress.add_task(what, total=total)
            progress.update(task, completed=done)  # type: ignore[arg-type]  # rich's own number

        report = compress(
            source, target, texts, quantization=quantization, pruning=pruning, form=options.format, step=step
        )
    _show(report, Console())
    print(f"Wrote {target}")
    return 0


def _quantization(options: argparse.Namespace) -> Quantization | None:
    if options.method is None:
        return None
    kind = _KINDS.get((options.bits, options.type))
    if kind is None:
        raise CompressError("--type float needs --bits 8: the format is fp8 (e4m3).")
    return Quantization(
        method=options.method,
        kind=kind,  # type: ignore[arg-type]  # one of _KINDS
        head=not options.keep_head,
        strength=options.strength,
        zero_points=options.zero_points,
    )


def _pruning(shares: list[str]) -> Pruning | None:
    """Of `--prune PART=SHARE`, which may be repeated."""
    if not shares:
        return None
    found: dict[str, float] = {}
    for text in shares:
        part, _, share = text.partition("=")
        try:
            found[part] = float(share)
        except ValueError:
            found[part] = -1.0
        if part not in ("heads", "neurons", "weights") or not 0 < found[part] < 1:
            raise CompressError(
                f"--prune {text}: give heads=SHARE, neurons=SHARE or weights=SHARE, with a share above 0 and below 1."
            )
    return Pruning(**found)


def _texts(source: Path, options: argparse.Namespace, console: Console) -> Texts:
    sizes = {"num_contexts": options.contexts, "num_held_out": options.held_out_contexts}
    if options.text is None:
        if options.held_out is not None:
            raise CompressError("--held-out needs --text: the model's own answers are held out as well.")
        with console.status("The model writes its calibration text"):
            return own_answers(load_model(source), **sizes, seed=options.seed, context=options.context)
    if not (source / "tokenizer.json").is_file():
        raise CheckpointError(f"{source / 'tokenizer.json'} is missing; calibration text needs a tokenizer.")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    return read_texts(tokenizer, options.text, options.held_out, **sizes, context=options.context)


def _show(report: Report, console: Console) -> None:
    quality = report.quality
    table = Table(title=f"{report.model}, on {quality.tokens:,} held-out tokens", title_justify="left")
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    before, after = quality.perplexity_before, quality.perplexity_after
    table.add_row("perplexity", f"{before:.4f}", f"{after:.4f}", f"{quality.change:+.2%}")
    table.add_row("KL, nats a token", "", f"{quality.kl:.5f}", "")
    old, new = report.num_bytes
    table.add_row("weights", size(old), size(new), f"{new / old - 1:+.0%}")
    console.print(table)
    for note in report.notes:
        console.print(f"note: {note}")
