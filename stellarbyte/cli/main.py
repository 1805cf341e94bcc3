"""The `stellarbyte` command: runs what was asked for. Turns every expected failure into one line; knows no command."""

import importlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from stellarbyte.cli.arguments import parse


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 1 for an error (its line is on stderr).

    As shells tell of signals it is 130 after Ctrl-C, 143 after SIGTERM, and 141 when nobody reads the output any more.
    """
    options = parse(arguments)
    previous = signal.signal(signal.SIGTERM, _exit_on_signal)
    failures: tuple[type[Exception], ...] = ()
    try:
        command = importlib.import_module(options.module)  # of one command only: torch alone takes a second
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
        return 128 + signal.SIGPIPE
    finally:
        signal.signal(signal.SIGTERM, previous)


def _exit_on_signal(number: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM as an exception, so that half-written folders are removed on the way out."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
