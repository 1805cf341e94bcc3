"""`stellarbyte replay`: whether a server gives the answer of a receipt again."""

import argparse
from pathlib import Path

from stellarbyte_client import StellarByteError
from stellarbyte_client.terminal.connection import Connection
from stellarbyte_client.terminal.replay import read_receipt, replay

FAILURES = (StellarByteError,)


def run(options: argparse.Namespace) -> int:
    receipt = read_receipt(Path(options.file))
    comparison = replay(Connection(url=options.url, api_key=options.api_key), receipt)
    print(*comparison.lines, sep="\n")
    return 0 if comparison.is_equal else 1
