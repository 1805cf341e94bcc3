"""The `stellarbyte` command: convert, info, generate. Turns every expected failure into one line; serves nothing."""

import argparse
import dataclasses
import json
import signal
import sys
from types import FrameType
from typing import NoReturn

import torch
from transformers import PreTrainedTokenizerFast, TextStreamer, set_seed

from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.demo import resolve_model
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.info import describe, describe_lines
from stellarbyte.checkpoint.native import load_model, open_checkpoint
from stellarbyte.checkpoint.progress import ProgressBar

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for an error (its line is on stderr), or 130 and 143 for signals."""
    options = _parser().parse_args(arguments)
    previous = signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        return options.run(options)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, previous)


def _exit_on_signal(number: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM as an exception, so that half-written folders are removed on the way out."""
    sys.exit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stellarbyte", description="Convert, inspect and try ByteTransformer models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("convert", help="make a ByteTransformer checkpoint from another one")
    command.add_argument("source", metavar="SRC", help="Hugging Face folder (Llama, Mistral, Qwen2/3) or GGUF file")
    command.add_argument("target", metavar="DST", help="folder to make")
    command.add_argument("--dtype", choices=DTYPES, help="default: as stored; float32 for quantized GGUF files")
    command.set_defaults(run=_convert)

    command = commands.add_parser("info", help="print a checkpoint's architecture, size and memory")
    command.add_argument("model", metavar="PATH", help="checkpoint folder, or demo")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_info)

    command = commands.add_parser("generate", help="answer one prompt")
    command.add_argument("model", metavar="PATH", help="checkpoint folder, or demo")
    command.add_argument("prompt", metavar="PROMPT")
    command.add_argument("--max-tokens", type=_positive_int, default=256, metavar="N", help="default: %(default)s")
    command.add_argument("--temperature", type=_temperature, default=0.0, metavar="T", help="0 (default): greedy")
    command.add_argument("--top-p", type=_probability, default=1.0, metavar="P", help="default: %(default)s")
    command.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    command.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    command.set_defaults(run=_generate)
    return parser


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not at least 0")
    return value


def _probability(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not more than 0 and at most 1")
    return value


def _convert(options: argparse.Namespace) -> int:
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    target = convert(options.source, options.target, dtype=dtype, progress=ProgressBar("Converting"))
    print(f"Wrote {target}")
    return 0


def _info(options: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(resolve_model(options.model, ProgressBar("Converting the demo model")))
    if options.json:
        figures = dataclasses.asdict(describe(checkpoint))
        print(json.dumps({"path": str(checkpoint.path), **figures, "config": checkpoint.config.to_dict()}, indent=2))
        return 0
    for label, text in describe_lines(checkpoint):
        print(f"{label:>12}  {text}")
    return 0


def _generate(options: argparse.Namespace) -> int:
    path = resolve_model(options.model, ProgressBar("Converting the demo model"))
    model = load_model(path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    if options.raw or tokenizer.chat_template is None:
        inputs = tokenizer(options.prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": options.prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    if options.seed is not None:
        set_seed(options.seed)
    sampling = {"temperature": options.temperature, "top_p": options.top_p} if options.temperature > 0 else {}
    model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=options.max_tokens,
        do_sample=options.temperature > 0,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
