"""`python -m tests.support.audited_server FLAGS`: the real server and the real engine, both watched by `audit`."""

import sys

from stellarbyte_server.__main__ import main
from tests.support import audit

if __name__ == "__main__":
    audit.install()
    sys.exit(main(engine_module="tests.support.audited_engine"))
