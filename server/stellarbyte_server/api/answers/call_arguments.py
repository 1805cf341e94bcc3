"""Incremental readers for the arguments of one call, for each format in which models write them."""

import json
import re
from typing import Protocol

from stellarbyte_server.api.answers.tagged_arguments import TaggedArguments, TaggedInput
from stellarbyte_server.api.structured.offered_tools import INPUT, OfferedTool
from stellarbyte_server.api.structured.tagged_parameters import kinds_of
from stellarbyte_server.api.structured.tool_formats import ToolFormat

_STRUCTURE = re.compile(r'["{}\[\]]')
_STRING_END = re.compile(r'["\\]')
# Complete characters and escapes of a string; a high surrogate only with the low surrogate that follows it.
_WHOLE = re.compile(
    r'(?:[^"\\]|\\[^u]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4})*', re.DOTALL
)


class ArgumentsReader(Protocol):
    """Reads one call's arguments, beginning after `parts_before`."""

    opening: str  # beginning of the arguments that `parts_before` has consumed
    is_complete: bool

    def read(self, text: str, position: int) -> tuple[int, str]:
        """Read from a position on. Returns the position reached, and the arguments' text read."""
        ...


def parts_before(tool: OfferedTool, format: ToolFormat) -> tuple[str, ...]:
    """The first parts of a call's arguments, after which the text is certainly a call."""
    if format.arguments == "tags":
        return ("<parameter=", INPUT, ">") if tool.is_custom else ()
    return ("{", f'"{INPUT}"', ":", '"') if tool.is_custom else ("{",)


def parts_after(tool: OfferedTool, format: ToolFormat) -> tuple[str, ...]:
    """Closing parts of the arguments, which the reader does not consume."""
    if not tool.is_custom:
        return ()
    return ("</function>",) if format.arguments == "tags" else ("}",)


def arguments_reader(tool: OfferedTool, format: ToolFormat) -> ArgumentsReader:
    if tool.is_last:
        return RestOfAnswer(drops_newline=format.arguments == "tags")
    if format.arguments == "json":
        return JsonString() if tool.is_custom else JsonObject()
    return TaggedInput() if tool.is_custom else TaggedArguments(kinds_of(tool))


class JsonObject:
    """A JSON object, unchanged; its first brace has been read."""

    opening = "{"

    def __init__(self) -> None:
        self.is_complete = False
        self._depth = 1
        self._is_string = False
        self._is_escaped = False

    def read(self, text: str, position: int) -> tuple[int, str]:
        start = position
        while position < len(text) and not self.is_complete:
            position = self._step(text, position)
        return position, text[start:position]

    def _step(self, text: str, position: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            return position + 1
        found = (_STRING_END if self._is_string else _STRUCTURE).search(text, position)
        if found is None:
            return len(text)
        if found[0] == '"':
            self._is_string = not self._is_string
        elif found[0] == "\\":
            self._is_escaped = True
        else:
            self._depth += 1 if found[0] in "{[" else -1
            self.is_complete = self._depth == 0
        return found.end()


class JsonString:
    """A JSON string, decoded; its first quote has been read."""

    opening = ""

    def __init__(self) -> None:
        self.is_complete = False
        self._held = ""  # an incomplete escape

    def read(self, text: str, position: int) -> tuple[int, str]:
        written = self._held + text[position:]
        found = _WHOLE.match(written)
        end = 0 if found is None else found.end()
        said = _decoded(written[:end])
        self.is_complete = written[end : end + 1] == '"'
        if self.is_complete:
            return len(text) - (len(written) - end - 1), said
        self._held = written[end:]
        if len(self._held) > 12:  # longer than any escape, so it is invalid
            said, self._held = said + self._held, ""
        return len(text), said


def _decoded(written: str) -> str:
    try:
        said: str = json.loads(f'"{written}"', strict=False)
    except ValueError:  # an invalid escape
        said = written
    return said.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # replaces lone surrogates


class RestOfAnswer:
    """Any text, up to the end of the answer."""

    opening = ""

    def __init__(self, *, drops_newline: bool) -> None:
        self.is_complete = False
        self._drops_newline = drops_newline

    def read(self, text: str, position: int) -> tuple[int, str]:
        if self._drops_newline and position < len(text):
            self._drops_newline = False
            position += text[position] == "\n"
        return len(text), text[position:]
