"""What pretrain, sft and lora have in common: the file is read, the run is started, and its end is told."""

import argparse
from collections.abc import Callable
from typing import TypeVar

from rich.console import Console

from stellarbyte.train.config.run import LoraRun, Pretrain, Sft
from stellarbyte.train.config.yaml_file import read_yaml
from stellarbyte.train.launch import train
from stellarbyte.train.ranks import is_first_rank, leave_group
from stellarbyte.train.rows import RunData

C = TypeVar("C", Pretrain, Sft, LoraRun)


def run_training(kind: str, section: type[C], rows: Callable[[C], RunData], options: argparse.Namespace) -> int:
    """The exit status: 0, or 128 and the number of the signal that stopped the run."""
    config = read_yaml(options.file, section, options.overrides)
    console = Console()
    outcome = train(kind, config, rows(config), resume=options.resume, console=console)
    reports = is_first_rank()
    leave_group()
    if outcome.folder is not None:
        if reports:
            console.print(f"Wrote {outcome.folder}", soft_wrap=True)
        return 0
    if reports:
        console.print(f"Stopped after step {outcome.step}; continue with --resume.")
    return 128 + (outcome.number or 0)
