"""`python -m tests.support.servers.audited_engine`: the real engine process, watched by `audit`."""

import sys

from stellarbyte_server.engine.process import main
from tests.support.servers import audit

if __name__ == "__main__":
    audit.install()
    sys.exit(main())
