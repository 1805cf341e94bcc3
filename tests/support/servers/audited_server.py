"""`python -m tests.support.servers.audited_server FLAGS`: server and engine, both watched by `audit`."""

import sys

from stellarbyte_server.__main__ import main
from tests.support.servers import audit

if __name__ == "__main__":
    audit.install()
    sys.exit(main(engine_module="tests.support.servers.audited_engine"))
