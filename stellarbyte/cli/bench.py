"""`stellarbyte bench`: from options to the client's settings."""

import argparse
from pathlib import Path

from stellarbyte_client import StellarByteError
from stellarbyte_client.terminal.bench import BenchSettings, bench
from stellarbyte_client.terminal.connection import Connection

FAILURES = (StellarByteError,)


def run(options: argparse.Namespace) -> int:
    """Returns 1 if any request failed."""
    all_well = bench(
        BenchSettings(
            connection=Connection(url=options.url, api_key=options.api_key),
            models=options.models,
            streams=options.streams,
            requests=options.requests,
            prompt_tokens=options.prompt_tokens,
            max_tokens=options.max_tokens,
            json_file=None if options.json is None else Path(options.json),
        )
    )
    return 0 if all_well else 1
