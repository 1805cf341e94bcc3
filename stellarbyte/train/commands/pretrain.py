"""`stellarbyte train pretrain`: a model from token shards."""

import argparse

from stellarbyte.train.commands.training import run_training
from stellarbyte.train.config.run import Pretrain
from stellarbyte.train.sources import token_rows


def run(options: argparse.Namespace) -> int:
    return run_training("pretrain", Pretrain, token_rows, options)
