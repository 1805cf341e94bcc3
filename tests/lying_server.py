"""`python -m tests.lying_server FLAGS`: a server that calls answers complete which were cut off, to test the tests."""

import sys

import msgspec

from server.__main__ import main
from server.engine import client
from server.engine.messages import Delta, failure


def false_end(request_id: str, message: str, code: str | None = None, param: str | None = None) -> Delta:
    return msgspec.structs.replace(failure(request_id, message, code, param), finish_reason="stop")


if __name__ == "__main__":
    client.failure = false_end
    sys.exit(main())
