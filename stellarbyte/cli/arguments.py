"""What the `stellarbyte` command understands. Imports nothing that takes time; runs nothing.

Every command sets `module`: whose `run(options)` does it.
"""

import argparse
import math
import os
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_URL = "http://127.0.0.1:8000"
SERVE = "stellarbyte.cli.serve"

_Commands = Any  # argparse has no public name for what add_subparsers returns


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of one command. What follows `serve` is left to the server, as `flags`."""
    parser = make_parser()
    options, flags = parser.parse_known_args(arguments)
    if options.module == SERVE:
        options.flags = flags
    elif flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    return options


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stellarbyte",
        description="Serve, convert, inspect and try models; talk to a server, look after it, measure it.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser(
        "serve", help="start the server (flags: stellarbyte serve --help)", add_help=False
    ).set_defaults(module=SERVE)
    _add_convert(commands)
    _add_info(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_adapters(commands)
    _add_bench(commands)
    return parser


def _add_convert(commands: _Commands) -> None:
    command = commands.add_parser("convert", help="make a ByteTransformer checkpoint from another one")
    command.add_argument("source", metavar="SRC", help="Hugging Face folder (Llama, Mistral, Qwen2/3) or GGUF file")
    command.add_argument("target", metavar="DST", help="folder to make")
    command.add_argument("--dtype", choices=DTYPES, help="default: as stored; float32 for quantized GGUF files")
    command.set_defaults(module="stellarbyte.cli.convert")


def _add_info(commands: _Commands) -> None:
    command = commands.add_parser("info", help="print a checkpoint's architecture, size and memory")
    command.add_argument("model", metavar="PATH", help="checkpoint folder, or demo")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(module="stellarbyte.cli.info")


def _add_generate(commands: _Commands) -> None:
    command = commands.add_parser("generate", help="answer one prompt, without a server")
    command.add_argument("model", metavar="PATH", help="checkpoint folder, or demo")
    command.add_argument("prompt", type=_text, metavar="PROMPT")
    command.add_argument("--max-tokens", type=_positive_int, default=256, metavar="N", help="default: %(default)s")
    command.add_argument("--temperature", type=_temperature, default=0.0, metavar="T", help="0 (default): greedy")
    command.add_argument("--top-p", type=_probability, default=1.0, metavar="P", help="default: %(default)s")
    command.add_argument("--seed", type=_seed, metavar="N", help="makes sampling repeatable; 0 to 4294967295")
    command.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    command.set_defaults(module="stellarbyte.cli.generate")


def _add_chat(commands: _Commands) -> None:
    command = commands.add_parser(
        "chat",
        parents=[_connection()],
        help="talk to a model on a server",
        description="Talk to a model on a server. With PROMPT, or when standard input is not a terminal, print the"
        " answer to that one question and exit.",
    )
    command.add_argument(
        "prompt", type=_text, nargs="?", metavar="PROMPT", help="one question; without it, a conversation"
    )
    command.add_argument(
        "--model", type=_text, metavar="NAME", help="the model or an adapter; default: the server's model"
    )
    command.add_argument("--system", type=_text, metavar="TEXT", help="system message")
    command.add_argument("--adapter-scale", type=_number, metavar="X", help="how strongly an adapter acts, 0 to 8")
    command.add_argument("--plain", action="store_true", help="show answers as they are, not as Markdown")
    command.add_argument("--quiet", action="store_true", help="no line with tokens and times after an answer")
    command.add_argument("--no-history", action="store_true", help="do not keep questions in ~/.local/state")
    sampling = command.add_argument_group("sampling", "What is not given is up to the server and the model.")
    sampling.add_argument("--max-tokens", type=_positive_int, metavar="N", help="longest answer")
    sampling.add_argument("--temperature", type=_temperature, metavar="T", help="0: always the likeliest token")
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
        help="what happens at the end of the context: an error, or the oldest tokens go out of sight",
    )
    command.set_defaults(module="stellarbyte.cli.chat")


def _add_adapters(commands: _Commands) -> None:
    command = commands.add_parser("adapters", help="list, load, unload and watch a server's adapters")
    actions = command.add_subparsers(required=True, metavar="ACTION", dest="action")
    connection = _connection(is_admin=True)

    action = actions.add_parser("list", parents=[connection], help="print the adapters as they are now")
    action.add_argument("--json", action="store_true", help="print JSON, with all that the server tells")

    action = actions.add_parser("load", parents=[connection], help="load an adapter, or replace one while it is used")
    action.add_argument("name", type=_text, metavar="NAME", help="what requests will call it")
    action.add_argument("path", type=_text, metavar="PATH", help="its folder, inside the server's --adapter-dir")
    action.add_argument("--replace", action="store_true", help="of a name that exists: give new requests this version")

    action = actions.add_parser("unload", parents=[connection], help="unload an adapter once its requests have ended")
    action.add_argument("name", type=_text, metavar="NAME")

    action = actions.add_parser("watch", parents=[connection], help="show the adapters until Ctrl-C")
    action.add_argument(
        "--interval", type=_positive, default=1.0, dest="interval_s", metavar="S", help="seconds; default: %(default)s"
    )
    command.set_defaults(module="stellarbyte.cli.adapters")


def _add_bench(commands: _Commands) -> None:
    command = commands.add_parser(
        "bench",
        parents=[_connection()],
        help="measure a server's speed with some numbers of streams",
        description="Measure a server's speed: for each number of streams, that many requests are kept running at once."
        " Prompts are random token ids, so that no prompt is found in the prefix cache, and answers all have the same"
        " length.",
    )
    command.add_argument(
        "--model",
        type=_names,
        dest="models",
        metavar="NAME[,NAME...]",
        help="the model or adapters, of which each stream takes the next; default: the server's model",
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
        "--max-tokens", type=_positive_int, default=64, metavar="N", help="of each answer; default: %(default)s"
    )
    command.add_argument("--json", metavar="FILE", help="also write everything measured as JSON")
    command.set_defaults(module="stellarbyte.cli.bench")


def _connection(*, is_admin: bool = False) -> argparse.ArgumentParser:
    """Where the server is and what opens it: what all commands that talk to one have in common."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("server")
    group.add_argument(
        "--url",
        default=os.environ.get("STELLARBYTE_URL") or DEFAULT_URL,
        help=f"its address; default: $STELLARBYTE_URL, or {DEFAULT_URL}",
    )
    group.add_argument(
        "--api-key",
        type=_key,
        default=next(iter(os.environ.get("STELLARBYTE_API_KEY", "").split()), None),  # a server takes several there
        metavar="KEY",
        help="default: the first in $STELLARBYTE_API_KEY, which other users of this machine cannot see",
    )
    if is_admin:
        group.add_argument(
            "--admin-api-key",
            type=_key,
            default=os.environ.get("STELLARBYTE_ADMIN_API_KEY") or None,
            metavar="KEY",
            help="to load and unload; default: $STELLARBYTE_ADMIN_API_KEY",
        )
    return parser


def _text(text: str) -> str:
    """What goes into a request: bytes that are no UTF-8, which Python keeps as surrogates, become replacement signs."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def _key(text: str) -> str:
    if not (text.isascii() and text.isprintable()):
        raise argparse.ArgumentTypeError("a key has printable ASCII characters only")  # and is shown nowhere
    return text


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _positive_int(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not at least 1")
    return value


def _seed(text: str) -> int:
    value = _whole(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 0 to {2**32 - 1}")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _positive(text: str) -> float:
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not more than 0")
    return value


def _temperature(text: str) -> float:
    value = _number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not at least 0")
    return value


def _probability(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not more than 0 and at most 1")
    return value


def _names(text: str) -> list[str]:
    names = _text(text).split(",")
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name")
    return names


def _counts(text: str) -> list[int]:
    try:
        return [_positive_int(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers from 1 on, such as 1,8,32") from None
