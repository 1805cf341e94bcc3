"""`stellarbyte info`: a checkpoint's architecture, size and memory use."""

import argparse
import dataclasses
import json

from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.info import describe, describe_lines, read_record
from stellarbyte.checkpoint.native import open_checkpoint
from stellarbyte.checkpoint.progress import ProgressBar
from stellarbyte.checkpoint.quantized.origin import read_origin
from stellarbyte.checkpoint.source import resolve_model

FAILURES = (CheckpointError,)


def run(options: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(resolve_model(options.model, ProgressBar("Converting")))
    if options.json:
        figures = dataclasses.asdict(describe(checkpoint))
        record = read_record(checkpoint.path)
        training = None if record is None else dataclasses.asdict(record)
        origin = read_origin(checkpoint.path)
        quantization = None if origin is None else dataclasses.asdict(origin)
        found = {"path": str(checkpoint.path), **figures, "quantization": quantization, "training": training}
        print(json.dumps(found | {"config": checkpoint.config.to_dict()}, indent=2))
        return 0
    for label, text in describe_lines(checkpoint):
        print(f"{label:>12}  {text}")
    return 0
