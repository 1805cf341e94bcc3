"""`python -m tests.audited_server FLAGS`: the real server and the real engine, both watched by `tests.audit`."""

import sys

from server.__main__ import main
from tests import audit

if __name__ == "__main__":
    audit.install()
    sys.exit(main(engine_module="tests.audited_engine"))
