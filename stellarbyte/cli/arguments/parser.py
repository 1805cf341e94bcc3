"""The arguments of the `stellarbyte` command. Imports only the standard library, so that --help is quick.

Every command sets `module`, whose `run(options)` executes it.
"""

import argparse
import math
import os
import re
from importlib.metadata import version
from typing import Any

from stellarbyte.cli.arguments.compress import add_compress
from stellarbyte.cli.arguments.train import add_train
from stellarbyte.cli.arguments.tune import add_tune

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_URL = "http://127.0.0.1:8000"
SOURCES = "Hugging Face folder, GGUF file, or name on the Hub: ORG/NAME[@REVISION]"
SERVE = "stellarbyte.cli.serve"

_Commands = Any  # argparse has no public name for what add_subparsers returns


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of one command; those after `serve` are passed to the server, as `flags`."""
    parser = make_parser()
    options, flags = parser.parse_known_args(arguments)
    if options.module == SERVE:
        options.flags = flags
    elif flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    elif "check" in options and (problem := options.check(options)) is not None:
        parser.error(problem)
    return options


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stellarbyte",
        description="Serve, convert, inspect and try models; use, manage and benchmark a server.",
    )
    parser.add_argument("--version", action="version", version=f"stellarbyte {version('stellarbyte')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser(
        "serve", help="start the server (flags: stellarbyte serve --help)", add_help=False
    ).set_defaults(module=SERVE)
    _add_convert(commands)
    add_compress(commands)
    _add_info(commands)
    _add_analyse(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_adapters(commands)
    add_tune(
        commands, _connection(is_admin=True), text=_text, positive_int=_positive_int, positive=_positive, whole=_whole
    )
    _add_replay(commands)
    _add_bench(commands)
    add_train(commands)
    return parser


def _add_convert(commands: _Commands) -> None:
    command = commands.add_parser("convert", help="convert a model to a ByteTransformer checkpoint")
    command.add_argument("source", metavar="SRC", help=SOURCES)
    command.add_argument("target", metavar="DST", help="folder to create")
    command.add_argument(
        "--dtype", choices=DTYPES, help="default: as stored, MXFP4 as bfloat16; float32 for other quantized GGUF files"
    )
    command.set_defaults(module="stellarbyte.cli.convert")


def _add_info(commands: _Commands) -> None:
    command = commands.add_parser("info", help="print a checkpoint's architecture, size and memory use")
    command.add_argument("model", metavar="MODEL", help=f"checkpoint, {SOURCES}, or demo")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument(
        "--plan", action="store_true", help="print what fits on --gpus devices; config.json is enough, without weights"
    )
    command.add_argument(
        "--memory", type=_byte_count, metavar="BYTES", help="with --plan: of each device, such as 80GB"
    )
    command.add_argument("--gpus", type=_positive_int, default=1, metavar="N", help="with --plan: devices; default: 1")
    command.set_defaults(module="stellarbyte.cli.info")


def _add_analyse(commands: _Commands) -> None:
    command = commands.add_parser(
        "analyse",
        help="write a report of a model: parameters, weights, attention, quality, speed, adapters",
        description="Write a report of a model as a page with pictures that opens from disk, and as JSON.",
    )
    command.add_argument("model", metavar="MODEL", help=f"checkpoint, {SOURCES}, or demo")
    command.add_argument("--out", default="report", metavar="DIR", help="folder to create; default: %(default)s")
    command.add_argument(
        "--text",
        type=_text,
        metavar="FILE|TEXT",
        help="what attention and quality are measured on, at most 64 KiB; default: a sample in the page's language",
    )
    command.add_argument(
        "--adapter",
        action="append",
        default=[],
        dest="adapters",
        metavar="DIR",
        help="an adapter in PEFT's format to analyse, too; can be repeated",
    )
    command.add_argument("--language", choices=("en", "zh"), default="en", help="of the page; default: %(default)s")
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    command.add_argument("--no-speed", action="store_false", dest="speed", help="do not measure speed")
    command.set_defaults(module="stellarbyte.cli.analyse")


def _add_generate(commands: _Commands) -> None:
    command = commands.add_parser("generate", help="answer one prompt, without a server")
    command.add_argument("model", metavar="MODEL", help=f"checkpoint, {SOURCES}, or demo")
    command.add_argument("prompt", type=_text, metavar="PROMPT")
    command.add_argument("--max-tokens", type=_positive_int, default=256, metavar="N", help="default: %(default)s")
    command.add_argument("--temperature", type=_temperature, default=0.0, metavar="T", help="0 (default): greedy")
    command.add_argument("--top-p", type=_probability, default=1.0, metavar="P", help="default: %(default)s")
    command.add_argument("--seed", type=_seed, metavar="N", help="makes sampling repeatable; 0 to 4294967295")
    command.add_argument("--raw", action="store_true", help="continue the prompt verbatim, without the chat template")
    command.set_defaults(module="stellarbyte.cli.generate")


def _add_chat(commands: _Commands) -> None:
    command = commands.add_parser(
        "chat",
        parents=[_connection()],
        help="chat with a model on a server",
        description="Chat with a model on a server. With PROMPT, or without a terminal on stdin, print one answer"
        " and exit.",
    )
    command.add_argument(
        "prompt", type=_text, nargs="?", metavar="PROMPT", help="one question; without it, a conversation"
    )
    command.add_argument(
        "--model", type=_text, metavar="NAME", help="the model or an adapter; default: the server's model"
    )
    command.add_argument("--system", type=_text, metavar="TEXT", help="system message")
    command.add_argument("--adapter-scale", type=_number, metavar="X", help="strength of the adapter, 0 to 8")
    command.add_argument("--plain", action="store_true", help="print answers as plain text, not as rendered Markdown")
    command.add_argument("--quiet", action="store_true", help="omit the line with tokens and times after an answer")
    command.add_argument("--no-history", action="store_true", help="do not store questions in ~/.local/state")
    sampling = command.add_argument_group("sampling", "Defaults come from the server and the model.")
    sampling.add_argument("--max-tokens", type=_positive_int, metavar="N", help="maximum tokens of the answer")
    sampling.add_argument("--temperature", type=_temperature, metavar="T", help="0: greedy")
    sampling.add_argument("--top-p", type=_probability, metavar="P")
    sampling.add_argument("--top-k", type=_whole, metavar="N")
    sampling.add_argument("--min-p", type=_number, metavar="P")
    sampling.add_argument("--repetition-penalty", type=_number, metavar="X")
    sampling.add_argument("--presence-penalty", type=_number, metavar="X")
    sampling.add_argument("--frequency-penalty", type=_number, metavar="X")
    sampling.add_argument("--seed", type=_whole, metavar="N", help="makes sampling repeatable")
    sampling.add_argument(
        "--context-overflow",
        choices=("error", "slide"),
        help="at the end of the context: error fails the request; slide evicts its oldest tokens",
    )
    command.set_defaults(module="stellarbyte.cli.chat")


def _add_adapters(commands: _Commands) -> None:
    command = commands.add_parser("adapters", help="list, load, unload and watch a server's adapters")
    actions = command.add_subparsers(required=True, metavar="ACTION", dest="action")
    connection = _connection(is_admin=True)

    action = actions.add_parser("list", parents=[connection], help="print the adapters")
    action.add_argument("--json", action="store_true", help="print all fields as JSON")

    action = actions.add_parser("load", parents=[connection], help="load an adapter, or replace one in place")
    action.add_argument("name", type=_text, metavar="NAME", help="name in requests")
    action.add_argument("path", type=_text, metavar="PATH", help="its folder, inside the server's --adapter-dir")
    action.add_argument(
        "--replace", action="store_true", help="replace the adapter of that name; running requests keep the old version"
    )

    action = actions.add_parser("unload", parents=[connection], help="unload an adapter once its requests have ended")
    action.add_argument("name", type=_text, metavar="NAME")

    action = actions.add_parser("watch", parents=[connection], help="show the adapters until Ctrl-C")
    action.add_argument(
        "--interval", type=_positive, default=1.0, dest="interval_s", metavar="S", help="seconds; default: %(default)s"
    )
    command.set_defaults(module="stellarbyte.cli.adapters")


def _add_replay(commands: _Commands) -> None:
    command = commands.add_parser(
        "replay",
        parents=[_connection()],
        help="ask for an answer once more by its receipt, and compare",
        description="Send the request of a receipt to a server once more and compare the answers. The exit status is 0"
        " if all tokens are equal, else 1.",
    )
    command.add_argument("file", metavar="FILE", help="JSON: a receipt, or an answer with one ('receipt': true)")
    command.set_defaults(module="stellarbyte.cli.replay")


def _add_bench(commands: _Commands) -> None:
    command = commands.add_parser(
        "bench",
        parents=[_connection()],
        help="measure a server's throughput and latency",
        description="Measure throughput and latency: for each number of streams, keep that many requests running."
        " Prompts are random token ids, so that the prefix cache does not help, and all answers have the same length.",
    )
    command.add_argument(
        "--model",
        type=_names,
        dest="models",
        metavar="NAME[,NAME...]",
        help="model or adapters, assigned to streams in turn; default: the server's model",
    )
    command.add_argument(
        "--streams", type=_counts, default=[1, 8, 32], metavar="N[,N...]", help="requests at once; default: 1,8,32"
    )
    command.add_argument(
        "--requests",
        type=_positive_int,
        metavar="N",
        help="for each number of streams N; default: 2 N, at least 8",
    )
    command.add_argument("--prompt-tokens", type=_positive_int, default=128, metavar="N", help="default: %(default)s")
    command.add_argument(
        "--max-tokens", type=_positive_int, default=64, metavar="N", help="tokens of each answer; default: %(default)s"
    )
    command.add_argument("--json", metavar="FILE", help="also write the measurements as JSON")
    command.set_defaults(module="stellarbyte.cli.bench")


def _connection(*, is_admin: bool = False) -> argparse.ArgumentParser:
    """Options of all commands that use a server: address and keys."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("server")
    group.add_argument(
        "--url",
        default=os.environ.get("STELLARBYTE_URL") or DEFAULT_URL,
        help=f"address; default: $STELLARBYTE_URL, or {DEFAULT_URL}",
    )
    group.add_argument(
        "--api-key",
        type=_key,
        default=next(iter(os.environ.get("STELLARBYTE_API_KEY", "").split()), None),  # a server accepts several there
        metavar="KEY",
        help="default: the first key in $STELLARBYTE_API_KEY, which other users cannot see",
    )
    if is_admin:
        group.add_argument(
            "--admin-api-key",
            type=_key,
            default=os.environ.get("STELLARBYTE_ADMIN_API_KEY") or None,
            metavar="KEY",
            help="for the operator's calls; default: $STELLARBYTE_ADMIN_API_KEY",
        )
    return parser


def _text(text: str) -> str:
    """Text for a request: invalid UTF-8, which Python keeps as surrogates, becomes replacement characters."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def _key(text: str) -> str:
    if not (text.isascii() and text.isprintable()):
        raise argparse.ArgumentTypeError("a key must consist of printable ASCII characters")  # never show the key
    return text


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer") from None


def _byte_count(text: str) -> int:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([KMGT]i?B|B)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of bytes with a unit, such as 80GB or 64GiB")
    power = "BKMGT".index(match[2][0])
    return int(float(match[1]) * (1024 if "i" in match[2] else 1000) ** power)


def _positive_int(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be ≥ 1")
    return value


def _seed(text: str) -> int:
    value = _whole(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} must be from 0 to {2**32 - 1}")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} must be a finite number")
    return value


def _positive(text: str) -> float:
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be > 0")
    return value


def _temperature(text: str) -> float:
    value = _number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be ≥ 0")
    return value


def _probability(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be > 0 and ≤ 1")
    return value


def _names(text: str) -> list[str]:
    names = _text(text).split(",")
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} contains an empty name")
    return names


def _counts(text: str) -> list[int]:
    try:
        return [_positive_int(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a list of integers ≥ 1, such as 1,8,32") from None
