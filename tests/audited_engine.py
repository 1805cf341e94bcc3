"""`python -m tests.audited_engine`: the real engine process, watched by `tests.audit`."""

import sys

from server.engine.process import main
from tests import audit

if __name__ == "__main__":
    audit.install()
    sys.exit(main())
