"""`python -m tests.support.stubs.lying_server FLAGS`: a server that calls cut answers complete, to test the tests."""

import sys
from unittest import mock

import msgspec

from stellarbyte_server.__main__ import main
from stellarbyte_server.client import engine_client
from stellarbyte_server.protocol.messages import Delta, failure


def false_end(request_id: str, message: str, code: str | None = None, param: str | None = None) -> Delta:
    return msgspec.structs.replace(failure(request_id, message, code, param), finish_reason="stop")


if __name__ == "__main__":
    mock.patch.object(engine_client, "failure", false_end).start()
    sys.exit(main())
