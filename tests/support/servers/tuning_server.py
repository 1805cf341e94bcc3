"""`python -m tests.support.servers.tuning_server FLAGS`: the real server, whose jobs train at usual priority."""

import sys
from functools import partial

from stellarbyte_server.__main__ import main
from stellarbyte_server.http import tuning

if __name__ == "__main__":
    command = (sys.executable, "-m", "tests.support.servers.eager_trainer")
    tuning.TuningRunner = partial(tuning.TuningRunner, command=command)  # type: ignore[assignment, misc]
    sys.exit(main())
