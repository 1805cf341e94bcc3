"""`stellarbyte train sft`: a model trained further on chats."""

import argparse

from stellarbyte.train.commands.training import run_training
from stellarbyte.train.config.run import Sft
from stellarbyte.train.sources import chat_rows


def run(options: argparse.Namespace) -> int:
    return run_training("sft", Sft, chat_rows, options)
