"""`python -m tests.support.tuning.tuning_server FLAGS`: the real server, whose jobs train at usual priority."""

import sys
from functools import partial

from stellarbyte_server.__main__ import main
from stellarbyte_server.api.routes.tuning import checks
from stellarbyte_server.http import tuning
from stellarbyte_server.tuning.checking import forecast
from stellarbyte_server.tuning.runner import TuningRunner

if __name__ == "__main__":
    command = (sys.executable, "-m", "tests.support.tuning.eager_trainer")
    vars(tuning)["TuningRunner"] = partial(TuningRunner, command=command)
    vars(checks)["forecast"] = partial(forecast, command=command)
    sys.exit(main())
