"""The arguments of `stellarbyte compress`. Imports only the standard library, as parser.py."""

import argparse
from pathlib import Path
from typing import Any


def add_compress(commands: Any) -> None:
    """Add `compress` to the parsers that argparse's add_subparsers returned."""
    command = commands.add_parser(
        "compress",
        help="write a smaller model: quantized with calibration, or pruned",
        description="Write a smaller model, with perplexity and KL divergence on held-out text in its report.json.",
    )
    command.add_argument("model", metavar="MODEL", help="checkpoint, Hugging Face folder, GGUF file, Hub name, or demo")
    command.add_argument("target", metavar="OUT", help="folder to create")
    command.add_argument(
        "--method", choices=("round", "gptq", "awq", "smoothquant"), help="how to quantize; default: only prune"
    )
    command.add_argument("--bits", choices=("4", "8"), default="4", help="of a weight; default: %(default)s")
    command.add_argument("--type", choices=("int", "float"), default="int", help="float: fp8 with --bits 8")
    command.add_argument("--keep-head", action="store_true", help="leave the output head as it is; default: 8 bits")
    command.add_argument(
        "--zero-points", choices=("integer", "real"), default="integer",
        help="of int4; real: mostly smaller errors, but compressed-tensors has none; default: %(default)s",
    )  # fmt: skip
    command.add_argument("--strength", type=float, metavar="X", help="smoothquant: 0 to 1; default: 0.5")
    command.add_argument(
        "--prune", action="append", default=[], metavar="PART=SHARE",
        help="cut out heads=SHARE or neurons=SHARE, set weights=SHARE to 0; can be repeated",
    )  # fmt: skip
    command.add_argument(
        "--format", choices=("stellarbyte", "compressed-tensors"), default="stellarbyte",
        help="compressed-tensors: a folder for transformers and vLLM; default: %(default)s",
    )  # fmt: skip
    texts = command.add_argument_group("texts", "Contexts of calibration never overlap held-out ones.")
    texts.add_argument("--text", type=Path, metavar="FILE", help="calibration text; default: the model's own answers")
    texts.add_argument("--held-out", type=Path, metavar="FILE", help="default: the last fifth of --text")
    texts.add_argument("--contexts", type=_count, default=64, metavar="N", help="for calibration; default: %(default)s")
    texts.add_argument(
        "--held-out-contexts", type=_count, default=32, metavar="N", help="to compare; default: %(default)s"
    )
    texts.add_argument(
        "--context", type=_length, default=512, metavar="N", help="tokens of a context; default: %(default)s"
    )
    texts.add_argument("--seed", type=int, default=0, metavar="N", help="of the model's own answers")
    command.set_defaults(module="stellarbyte.cli.compress")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer ≥ 1")
    return int(text)


def _length(text: str) -> int:
    if _count(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} must be ≥ 2")
    return int(text)
