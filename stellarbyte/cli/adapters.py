"""`stellarbyte adapters`: from options to the client's calls."""

import argparse

from stellarbyte_client import StellarByteError
from stellarbyte_client.terminal.adapters import AdapterCommands
from stellarbyte_client.terminal.connection import Connection

FAILURES = (StellarByteError,)


def run(options: argparse.Namespace) -> int:
    connection = Connection(url=options.url, api_key=options.api_key, admin_api_key=options.admin_api_key)
    commands = AdapterCommands(connection)
    match options.action:
        case "list" if options.json:
            commands.list_json()
        case "list":
            commands.list()
        case "load":
            commands.load(options.name, options.path, replace=options.replace)
        case "unload":
            commands.unload(options.name)
        case "watch":
            commands.watch(options.interval_s)
    return 0
