"""The arguments of `stellarbyte tune`. Imports only the standard library, as parser.py."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMATS = ("sft", "dpo", "trl")
_OF_JOBS = (
    "validation",
    "suffix",
    "n_epochs",
    "batch_size",
    "learning_rate_multiplier",
    "seed",
    "publish",
    "exact_match",
    "detach",
)
_ACTIONS = ("resume", "cancel", "delete", "back", "from_feedback")


def add_tune(
    commands: Any,
    connection: argparse.ArgumentParser,
    *,
    text: Callable[[str], str],
    positive_int: Callable[[str], int],
    positive: Callable[[str], float],
    whole: Callable[[str], int],
) -> None:
    """Add `tune` to the parsers that argparse's add_subparsers returned; the others are types of arguments."""
    command = commands.add_parser(
        "tune",
        parents=[connection],
        help="train an adapter on a running server from examples",
        description="Train an adapter on a running server (--fine-tuning): check the examples, start a job, watch it,"
        " and compare the new model with the base. With the admin key, the job belongs to it.",
    )
    action = command.add_mutually_exclusive_group()
    action.add_argument("examples", nargs="?", metavar="EXAMPLES", help="JSON lines with one example each")
    action.add_argument("--resume", type=text, metavar="JOB", help="watch a job again; a paused one continues")
    action.add_argument("--list", action="store_true", help="print the jobs, newest first")
    action.add_argument("--cancel", type=text, metavar="JOB", help="cancel a job")
    action.add_argument("--delete", type=text, metavar="JOB", help="delete the files and the model of an ended job")
    action.add_argument("--back", type=text, metavar="NAME", help="make the version before live again under NAME")
    action.add_argument(
        "--from-feedback", type=Path, metavar="OUT", help="make examples of the server's ratings (--feedback)"
    )
    job = command.add_argument_group("job")
    job.add_argument("--validation", type=Path, metavar="FILE", help="examples whose loss is computed, not learned")
    job.add_argument("--suffix", type=text, metavar="NAME", help="part of the model's name")
    job.add_argument("--epochs", type=positive_int, dest="n_epochs", metavar="N", help="default: the server chooses")
    job.add_argument(
        "--batch-size", type=positive_int, metavar="N", help="examples in a step; default: the server chooses"
    )
    job.add_argument("--learning-rate-multiplier", type=positive, metavar="X", help="default: the server chooses")
    job.add_argument("--seed", type=whole, metavar="N", help="of the order of examples; default: random")
    job.add_argument("--publish", type=text, metavar="NAME", help="make the model live under NAME, too")
    job.add_argument(
        "--share", type=positive, metavar="X", help="with --publish: share of NAME's callers that get it; default: all"
    )
    job.add_argument(
        "--exact-match",
        action="store_true",
        help="with --validation: also count answers that are equal to the examples",
    )
    job.add_argument("--detach", action="store_true", help="return once the job is started")
    command.add_argument(
        "--prompt",
        type=text,
        action="append",
        default=[],
        dest="prompts",
        metavar="TEXT",
        help="answered by base and new model in the end; can be repeated; default: a terminal asks for some",
    )
    command.add_argument(
        "--format",
        choices=FORMATS,
        default="sft",
        help="of --from-feedback: sft (default): chats with good or better answers; dpo: better answers before rated"
        " ones, as OpenAI's preference data; trl: the same for TRL",
    )
    command.set_defaults(module="stellarbyte.cli.tune", check=_check)


def _check(options: argparse.Namespace) -> str | None:
    """The reason why options contradict each other, or do not suffice."""
    if not (options.examples or options.list) and not any(getattr(options, name) for name in _ACTIONS):
        return "give EXAMPLES, or one of --resume, --list, --cancel, --delete, --back and --from-feedback"
    if options.share is not None and options.publish is None:
        return "--share needs --publish"
    if options.exact_match and options.examples is not None and options.validation is None:
        return "--exact-match needs --validation"
    if options.examples is None:
        given = [name for name in _OF_JOBS if getattr(options, name) not in (None, False)]
        if given:
            return f"--{given[0].replace('n_epochs', 'epochs').replace('_', '-')} needs EXAMPLES"
        if options.prompts and options.resume is None:
            return "--prompt needs EXAMPLES or --resume"
    if options.format != "sft" and options.from_feedback is None:
        return "--format needs --from-feedback"
    return None
