"""`stellarbyte tune`: from options to the client's calls."""

import argparse
from pathlib import Path

from stellarbyte_client import StellarByteError
from stellarbyte_client.terminal.connection import Connection
from stellarbyte_client.terminal.tune.tune import TuneCommands, TuneSettings

FAILURES = (StellarByteError,)


def run(options: argparse.Namespace) -> int:
    connection = Connection(url=options.url, api_key=options.api_key, admin_api_key=options.admin_api_key)
    commands = TuneCommands(connection, options.prompts)
    if options.list:
        commands.list()
    elif options.cancel is not None:
        commands.cancel(options.cancel)
    elif options.delete is not None:
        commands.delete(options.delete)
    elif options.back is not None:
        commands.back(options.back)
    elif options.from_feedback is not None:
        commands.write_feedback(options.from_feedback, options.format)
    elif options.resume is not None:
        return commands.resume(options.resume)
    else:
        given = {name: getattr(options, name) for name in ("n_epochs", "batch_size", "learning_rate_multiplier")}
        return commands.start(
            TuneSettings(
                examples=Path(options.examples),
                validation=options.validation,
                suffix=options.suffix,
                seed=options.seed,
                hyperparameters={name: value for name, value in given.items() if value is not None},
                publish=options.publish,
                share=options.share,
                counts_exact=options.exact_match,
                is_detached=options.detach,
            )
        )
    return 0
