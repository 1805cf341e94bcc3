"""`python -m tests.support.audited_engine`: the real engine process, watched by `tests.support.audit`."""

import sys

from stellarbyte_server.engine.process import main
from tests.support import audit

if __name__ == "__main__":
    audit.install()
    sys.exit(main())
