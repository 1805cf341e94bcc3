"""`stellarbyte convert`: convert a model to a ByteTransformer checkpoint."""

import argparse

import torch

from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.progress import ProgressBar
from stellarbyte.checkpoint.source import find_source

FAILURES = (CheckpointError,)


def run(options: argparse.Namespace) -> int:
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    target = convert(find_source(options.source), options.target, dtype=dtype, progress=ProgressBar("Converting"))
    print(f"Wrote {target}")
    return 0
