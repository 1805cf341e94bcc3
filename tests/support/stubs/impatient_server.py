"""`python -m tests.support.stubs.impatient_server FLAGS`: the fake server; its streams send headers at once."""

import sys
from unittest import mock

from stellarbyte_server.__main__ import main
from stellarbyte_server.api.answers import queueing

if __name__ == "__main__":
    mock.patch.object(queueing, "HEADERS_AFTER_S", 0.0).start()
    sys.exit(main(engine_module="tests.support.servers.fake_engine"))
