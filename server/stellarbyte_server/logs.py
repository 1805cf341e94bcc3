"""Logging of all processes: one line per message on stderr, as text or JSON, in one format."""

import io
import json
import logging
import sys
import threading
import time
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]
_logger = logging.getLogger("server")


def configure_logging(
    level: str, process: str, log_format: LogFormat = "text", *, is_stdout_free: bool = False
) -> None:
    """Send this process's messages of at least `level` to stderr. Called once, at the start of a process.

    With `log_format` "json" all other output of Python code to stderr also becomes such lines, and with
    `is_stdout_free` its output to stdout, which is otherwise unused.
    """
    stderr = sys.__stderr__ if sys.__stderr__ is not None else sys.stderr
    handler = logging.StreamHandler(stderr)
    handler.setFormatter(JsonFormatter(process) if log_format == "json" else TextFormatter(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("asyncio", "sse_starlette", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    if log_format == "json":
        sys.stderr = LinesToLog(stderr, logging.getLogger("stderr"), logging.WARNING)
        if is_stdout_free:
            sys.stdout = LinesToLog(sys.stdout, logging.getLogger("stdout"), logging.INFO)
        sys.excepthook = _log_uncaught
        threading.excepthook = _log_uncaught_in_thread


def fields_of_line(fields: Mapping[str, Any], already_said: Collection[str] = ()) -> dict[str, Any]:
    """The `extra` of a log call for a line with fields, without those that are None.

    JSON has all fields; text appends those that are not in `already_said`.
    """
    present = {name: value for name, value in fields.items() if value is not None}
    return {"fields": present, "already_said": tuple(already_said)}


class TextFormatter(logging.Formatter):
    """Time, level, process, logger and message; then the line's fields as name=value."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        said = getattr(record, "already_said", ())
        shown = [f" {name}={value}" for name, value in getattr(record, "fields", {}).items() if name not in said]
        return line + "".join(shown)


class JsonFormatter(logging.Formatter):
    """One JSON object in one line, in ASCII; a traceback is the field "traceback"."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        content = {
            "time": f"{moment}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        } | getattr(record, "fields", {})
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        elif record.exc_text:
            content["traceback"] = record.exc_text
        if record.stack_info:
            content["stack"] = self.formatStack(record.stack_info)
        return json.dumps(content, default=str)


class LinesToLog(io.TextIOBase):
    """A text stream in place of stdout or stderr whose lines become messages of a logger."""

    def __init__(self, replaced: TextIO, logger: logging.Logger, level: int) -> None:
        self._replaced = replaced
        self._logger = logger
        self._level = level
        self._rest = ""
        self._is_writing = False

    def write(self, text: str) -> int:
        if self._is_writing:
            return len(text)  # logging itself reports here that it cannot write
        self._is_writing = True
        try:
            *lines, self._rest = (self._rest + text.replace("\r", "\n")).split("\n")
            for line in lines:
                if line.strip():
                    self._logger.log(self._level, "%s", line)
        finally:
            self._is_writing = False
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._replaced.fileno()


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _logger.critical("an unexpected error ends the process", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is not None:
        error = (arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
        _logger.error("an unexpected error ends a thread", exc_info=error)
