"""`stellarbyte info`: a checkpoint's architecture, size and memory use, and what fits on which devices."""

import argparse
import dataclasses
import json

from stellarbyte.checkpoint.dummy import dummy_config
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.info import describe, describe_lines, kept_tokens, read_record, size
from stellarbyte.checkpoint.native import open_checkpoint
from stellarbyte.checkpoint.progress import ProgressBar
from stellarbyte.checkpoint.quantized.origin import read_origin
from stellarbyte.checkpoint.source import resolve_model
from stellarbyte.parallel.plan import USED_SHARE, RankPlan, plan_ranks

FAILURES = (CheckpointError,)


def run(options: argparse.Namespace) -> int:
    if options.plan:
        return _print_plan(options)
    if options.memory is not None or options.gpus != 1:
        raise CheckpointError("--memory and --gpus need --plan.")
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


def _print_plan(options: argparse.Namespace) -> int:
    """What fits on the devices; needs a config only."""
    path = resolve_model(options.model, needs_weights=False)
    config = dummy_config(path)
    kept = kept_tokens(config)
    plans = plan_ranks(config, kept, devices=options.gpus, memory=options.memory)
    if options.json:
        told = {"path": str(path), "devices": options.gpus, "memory": options.memory, "kept_tokens": kept}
        print(json.dumps(told | {"plans": [dataclasses.asdict(plan) for plan in plans]}, indent=2))
        return 0
    print(f"{path}: {options.gpus} × {'unknown memory' if options.memory is None else size(options.memory)}")
    if options.memory is not None:
        print(f"{USED_SHARE:.0%} of it is used; what a step computes with comes out of the cache")
    print(f"a sequence of full length keeps {kept:,} tokens; figures are of the rank that holds most\n")
    print(f"{'dtype':10}{'ranks':>6}{'replicas':>10}{'weights':>12}{'KV/token':>12}{'cache':>12}{'sequences':>11}")
    for plan in plans:
        print(_row(plan))
    if options.gpus > 1:
        print("\nmore than one rank (--tensor-parallel-size): not run on several GPUs yet")
    return 0


def _row(plan: RankPlan) -> str:
    cache, sequences = "", ""
    if plan.cache_bytes is not None and plan.full_sequences is not None:
        cache = size(plan.cache_bytes) if plan.cache_bytes else "no room"
        sequences = f"{plan.full_sequences:,.1f}"
    weights, per_token = size(plan.weight_bytes), size(plan.kv_bytes_per_token)
    return f"{plan.dtype:10}{plan.ranks:6}{plan.replicas:10}{weights:>12}{per_token:>12}{cache:>12}{sequences:>11}"
