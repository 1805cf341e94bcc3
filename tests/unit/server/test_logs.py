"""Log lines: the same fields as text and as JSON, one line each whatever is logged."""

import io
import json
import logging
import subprocess
import sys

import pytest
from starlette.datastructures import Headers

from stellarbyte_server.api.middleware import request_id_for
from stellarbyte_server.logs import JsonFormatter, LinesToLog, TextFormatter, fields_of_line
from tests.support.servers.server_process import ROOT


def record(message: str, *arguments: object, **more: object) -> logging.LogRecord:
    return logging.getLogger("server.x").makeRecord(
        "server.x", logging.WARNING, "f.py", 1, message, arguments, more.pop("exc_info", None), extra=more or None
    )


def test_fields_are_in_json_and_behind_the_message_as_text() -> None:
    extra = fields_of_line({"path": "/x", "status": 200, "key": None, "ttft_s": 0.5}, already_said=("path", "status"))
    line = record("GET %s 200", "/x", **extra)
    assert TextFormatter("http-1").format(line).endswith(" WARNING http-1 server.x: GET /x 200 ttft_s=0.5")
    content = json.loads(JsonFormatter("http-1").format(line))
    assert content.pop("time").endswith("Z")
    assert content == {
        "level": "warning",
        "process": "http-1",
        "logger": "server.x",
        "message": "GET /x 200",
        "path": "/x",
        "status": 200,
        "ttft_s": 0.5,
    }


def test_a_traceback_is_a_field_of_its_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        line = JsonFormatter("engine").format(record("it\nfailed", exc_info=sys.exc_info()))
    assert "\n" not in line
    content = json.loads(line)
    assert content["message"] == "it\nfailed"
    assert content["traceback"].startswith("Traceback") and content["traceback"].endswith("ValueError: two\nlines")


def test_any_text_is_one_line_of_ascii() -> None:
    line = JsonFormatter("engine").format(record("\u2028 \r\n \x00 \ud800 é %s", object()))
    assert line.isascii() and line.isprintable()
    json.loads(line)


def test_what_is_printed_becomes_messages_also_when_logging_itself_cannot_write() -> None:
    class Broken(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError("no space")

    seen: list[str] = []
    logger = logging.Logger("stderr")
    stream = LinesToLog(io.StringIO(), logger, logging.WARNING)
    logger.addHandler(logging.StreamHandler(Broken()))  # its complaint goes to stderr, so here again
    handler = logging.Handler()
    handler.emit = lambda line: seen.append(line.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    old, sys.stderr = sys.stderr, stream
    try:
        stream.write("50%\r100")
        stream.write("%\n\nend %s")
    finally:
        sys.stderr = old
    assert seen == ["50%", "100%"], "an unfinished line waits"


@pytest.mark.parametrize(
    "code",
    [
        "raise RuntimeError('told to')",
        "import threading; t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()",
        "import warnings; warnings.warn('old')",
        "import sys; print('printed'); sys.stderr.write('also\\n')",
        "import asyncio\nasync def f(): asyncio.get_running_loop().call_soon(lambda: 1 / 0); await asyncio.sleep(0)\n"
        "asyncio.run(f())",
    ],
)
def test_nothing_that_a_process_says_breaks_the_form(code: str) -> None:
    begin = (
        "from stellarbyte_server.logs import configure_logging\n"
        "configure_logging('info', 'p', 'json', is_stdout_free=True)\n"
    )
    ended = subprocess.run([sys.executable, "-c", begin + code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    lines = ended.stderr.splitlines()
    assert lines and not ended.stdout
    for line in lines:
        assert json.loads(line)["process"] == "p"
    assert len(lines) == (2 if "print" in code else 1)


@pytest.mark.parametrize("given", ["a", "0b5c1d8e-9f0a-4c3b", "Root=1-67891233-abcdef", "a/b+c=:~@.x_y", "x" * 128])
def test_a_clients_request_id_is_kept(given: str) -> None:
    assert request_id_for(Headers({"x-request-id": given})) == given


@pytest.mark.parametrize(
    "given", ["", "x" * 129, "a b", "a\nb", "é", "a;b", '"a"', "a\x1b[31m", "$(x)", "<script>", "{}"]
)
def test_another_request_id_is_replaced(given: str) -> None:
    made = request_id_for(Headers(raw=[(b"x-request-id", given.encode())]))
    assert made != given and len(made) == 16


def test_of_two_request_ids_neither_is_kept() -> None:
    assert request_id_for(Headers(raw=[(b"x-request-id", b"a"), (b"x-request-id", b"b")])) not in ("a", "b", "a, b")
