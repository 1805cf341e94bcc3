"""The `stellarbyte` command: runs one command and prints each expected failure as one line."""

import importlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from stellarbyte.cli.arguments.parser import parse


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 1 for an error (its line is on stderr).

    As in shells, it is 130 after Ctrl-C, 143 after SIGTERM, and 141 after the reader closed the output.
    """
    options = parse(arguments)
    previous = signal.signal(signal.SIGTERM, _exit_on_signal)
    if sys.stdin is not None and sys.stdin.isatty():  # Ctrl-C ends it there, also where a parent ignores SIGINT
        signal.signal(signal.SIGINT, signal.default_int_handler)
    failures: tuple[type[Exception], ...] = ()
    try:
        command = importlib.import_module(options.module)  # only this command's: importing torch takes a second
        failures = command.FAILURES
        status = command.run(options)
        print(end="", flush=True)
        return status
    except failures as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # as in `stellarbyte generate ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python reports an error at exit
        return 128 + signal.SIGPIPE
    finally:
        signal.signal(signal.SIGTERM, previous)


def _exit_on_signal(number: int, _frame: FrameType | None) -> NoReturn:
    """Raise SystemExit on SIGTERM, so that incomplete folders are removed."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
