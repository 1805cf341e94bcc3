"""`stellarbyte train`: runs one of the commands in stellarbyte.train.commands."""

import argparse
import importlib

from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.train.errors import TrainError

FAILURES = (CheckpointError, TrainError)


def run(options: argparse.Namespace) -> int:
    # Imported here: a missing library of the extra `train` is one of the failures.
    status: int = importlib.import_module(f"stellarbyte.train.commands.{options.action}").run(options)
    return status
