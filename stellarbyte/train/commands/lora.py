"""`stellarbyte train lora`: an adapter from chats."""

import argparse

from stellarbyte.train.commands.training import run_training
from stellarbyte.train.config.run import LoraRun
from stellarbyte.train.sources import chat_rows


def run(options: argparse.Namespace) -> int:
    return run_training("lora", LoraRun, chat_rows, options)
