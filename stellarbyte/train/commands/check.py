"""`stellarbyte train check`: what a run would do and how long it would take. Writes nothing."""

import argparse
from typing import Any

from pydantic import ConfigDict
from rich.console import Console
from rich.table import Table

from stellarbyte.train.config.run import LoraRun, Pretrain, Sft
from stellarbyte.train.config.yaml_file import Section, read_yaml
from stellarbyte.train.forecast import Forecast, forecast, forecast_lines
from stellarbyte.train.sources import chat_rows, token_rows


class _AnyRun(Section):
    """The sections by which files of one kind differ from those of another."""

    model_config = ConfigDict(extra="allow")

    lora: Any = None
    data: Any = None


def run(options: argparse.Namespace) -> int:
    table = Table(show_header=False, box=None)
    for line in forecast_lines(_forecast(options)):
        table.add_row(*line)
    Console().print(table)
    return 0


def _forecast(options: argparse.Namespace) -> Forecast:
    given = read_yaml(options.file, _AnyRun, options.overrides)
    if "lora" in given.model_fields_set:
        lora = read_yaml(options.file, LoraRun, options.overrides)
        return forecast(lora, chat_rows(lora))
    if isinstance(given.data, dict) and "chats" in given.data:
        sft = read_yaml(options.file, Sft, options.overrides)
        return forecast(sft, chat_rows(sft))
    pretrain = read_yaml(options.file, Pretrain, options.overrides)
    return forecast(pretrain, token_rows(pretrain))
