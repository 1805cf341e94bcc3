"""`stellarbyte analyse`: a report of a model's parts, weights, attention, quality, speed and adapters."""

import argparse
import sys
from pathlib import Path

import torch

from stellarbyte.analysis.errors import AnalysisError
from stellarbyte.analysis.text import read_text
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.progress import ProgressBar
from stellarbyte.checkpoint.source import resolve_model
from stellarbyte.checkpoint.staging import refuse_existing, staged_folder

FAILURES = (CheckpointError, AnalysisError)


def run(options: argparse.Namespace) -> int:
    try:
        import matplotlib  # noqa: F401  # before minutes of work
    except ImportError as error:
        command = f"{sys.executable} -m pip install 'stellarbyte[analysis]'"
        raise AnalysisError(f"stellarbyte analyse needs matplotlib: {command}.") from error
    from stellarbyte.analysis.analyse import Request, analyse
    from stellarbyte.analysis.page.report import PAGE, write_report

    out = Path(options.out)
    refuse_existing(out)
    request = Request(
        name=Path(options.model).name or options.model,
        checkpoint=resolve_model(options.model, ProgressBar("Converting")),
        text=read_text(options.text, options.language),
        text_is_given=options.text is not None,
        adapters=tuple(map(Path, options.adapters)),
        measures_speed=options.speed,
        device=_device(options.device),
    )
    with staged_folder(out) as folder:
        analysis = analyse(request, progress=ProgressBar("Reading weights"), tell=_tell)
        _tell("drawing")
        write_report(analysis, folder, options.language)
    print(f"Wrote {out / PAGE}")
    return 0


def _device(wanted: str | None) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise AnalysisError("--device cuda needs a GPU that torch can use; there is none.")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def _tell(step: str) -> None:
    print(f"{step} ...", file=sys.stderr)
