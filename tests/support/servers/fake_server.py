"""`python -m tests.support.servers.fake_server FLAGS`: the real server in front of the fake engine."""

import sys

from stellarbyte_server.__main__ import main

if __name__ == "__main__":
    sys.exit(main(engine_module="tests.support.servers.fake_engine"))
