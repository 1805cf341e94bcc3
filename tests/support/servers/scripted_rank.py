"""A rank that computes nothing: it follows the real protocol, and its steps fail as its first message says. When it
should meet the others, it ends with status 3.

`RankStart.settings.model`: "fails" or "serves".
"""

import os
import sys

from stellarbyte_server.engine.ranks.messages import (
    Connect,
    RankLoaded,
    RankStart,
    StartStep,
    StepFailed,
    ToRank,
    read_message,
    write_message,
)


def main() -> int:
    stdin, stdout = os.fdopen(0, "rb"), os.fdopen(1, "wb")
    start = read_message(stdin, ToRank)  # type: ignore[arg-type]
    assert isinstance(start, RankStart)
    write_message(stdout, RankLoaded())
    while (message := read_message(stdin, ToRank)) is not None:
        if isinstance(message, Connect):
            return 3
        if isinstance(message, StartStep) and start.settings.model == "fails":
            write_message(stdout, StepFailed("RuntimeError: as told", 0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
