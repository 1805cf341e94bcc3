"""`stellarbyte serve`: start the server with its own flags."""

import argparse

FAILURES: tuple[type[Exception], ...] = ()


def run(options: argparse.Namespace) -> int:
    from stellarbyte_server.__main__ import main

    return main(options.flags)
