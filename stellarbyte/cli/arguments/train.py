"""The arguments of `stellarbyte train`. Imports only the standard library, as parser.py."""

from pathlib import Path
from typing import Any

# Each is a module of stellarbyte.train.commands: name, what it does, whether it can continue a run.
TRAIN_COMMANDS = (
    ("tokenizer", "train a tokenizer on texts", False),
    ("prepare", "turn texts into token shards", True),
    ("pretrain", "train a model on token shards", True),
    ("sft", "train a model on chats", True),
    ("lora", "train an adapter on chats", True),
    ("check", "show what a training run would do, and measure a step of it", False),
)


def add_train(commands: Any) -> None:
    """Add `train` to the parsers that argparse's add_subparsers returned."""
    train = commands.add_parser("train", help="from texts to a tokenizer, token shards and a model")
    actions = train.add_subparsers(required=True, metavar="ACTION", dest="action")
    for name, purpose, can_resume in TRAIN_COMMANDS:
        action = actions.add_parser(name, help=purpose, description=f"{purpose.capitalize()}, as FILE says.")
        action.add_argument("file", type=Path, metavar="FILE", help="settings in YAML")
        action.add_argument(
            "--set",
            action="append",
            default=[],
            dest="overrides",
            metavar="KEY=VALUE",
            help="another value for a setting, such as a.b=3; can be repeated",
        )
        if can_resume:
            action.add_argument("--resume", action="store_true", help="continue a run that was interrupted")
        action.set_defaults(module="stellarbyte.cli.train")
