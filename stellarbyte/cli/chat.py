"""`stellarbyte chat`: from options to the client's settings."""

import argparse

from stellarbyte_client import StellarByteError
from stellarbyte_client.terminal.chat import ChatSettings, chat
from stellarbyte_client.terminal.connection import Connection
from stellarbyte_client.terminal.conversation import FIELDS

FAILURES = (StellarByteError,)


def run(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name) for name in FIELDS}
    chat(
        ChatSettings(
            connection=Connection(url=options.url, api_key=options.api_key),
            prompt=options.prompt,
            model=options.model,
            system=options.system,
            adapter_scale=options.adapter_scale,
            sampling={name: value for name, value in given.items() if value is not None},
            is_plain=options.plain,
            is_quiet=options.quiet,
            keeps_history=not options.no_history,
        )
    )
    return 0
