"""Reads the arguments of one call as they arrive, whatever the model writes them as."""

import json
import re
from typing import Protocol

from stellarbyte_server.api.answers.tagged_arguments import TaggedArguments, TaggedInput
from stellarbyte_server.api.structured.offered_tools import INPUT, OfferedTool
from stellarbyte_server.api.structured.tagged_parameters import kinds_of
from stellarbyte_server.api.structured.tool_formats import ToolFormat

_STRUCTURE = re.compile(r'["{}\[\]]')
_STRING_END = re.compile(r'["\\]')
# Whole characters and escapes of a string; a high surrogate only with the low one that follows it.
_WHOLE = re.compile(
    r'(?:[^"\\]|\\[^u]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4})*', re.DOTALL
)


class ArgumentsReader(Protocol):
    """Reads one call's arguments, from what the last part before them is followed by."""

    opening: str  # that the parts before them say already
    is_complete: bool

    def read(self, text: str, position: int) -> tuple[int, str]:
        """How far it came, and what that says."""
        ...


def parts_before(tool: OfferedTool, format: ToolFormat) -> tuple[str, ...]:
    """Parts of a call after which it is certain to be one: the first ones of its arguments."""
    if format.arguments == "tags":
        return ("<parameter=", INPUT, ">") if tool.is_custom else ()
    return ("{", f'"{INPUT}"', ":", '"') if tool.is_custom else ("{",)


def parts_after(tool: OfferedTool, format: ToolFormat) -> tuple[str, ...]:
    """Parts that belong to the arguments but are not read with them."""
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
    """An object, as it was written; its first brace was read already."""

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
    """The text that a string means; its first quote was read already."""

    opening = ""

    def __init__(self) -> None:
        self.is_complete = False
        self._held = ""  # the beginning of an escape

    def read(self, text: str, position: int) -> tuple[int, str]:
        written = self._held + text[position:]
        found = _WHOLE.match(written)
        end = 0 if found is None else found.end()
        said = _decoded(written[:end])
        self.is_complete = written[end : end + 1] == '"'
        if self.is_complete:
            return len(text) - (len(written) - end - 1), said
        self._held = written[end:]
        if len(self._held) > 12:  # no escape is as long, so this is none
            said, self._held = said + self._held, ""
        return len(text), said


def _decoded(written: str) -> str:
    try:
        said: str = json.loads(f'"{written}"', strict=False)
    except ValueError:  # an escape that JSON does not know
        said = written
    return said.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # halves of characters are none


class RestOfAnswer:
    """A text up to the end of the answer."""

    opening = ""

    def __init__(self, *, drops_newline: bool) -> None:
        self.is_complete = False
        self._drops_newline = drops_newline

    def read(self, text: str, position: int) -> tuple[int, str]:
        if self._drops_newline and position < len(text):
            self._drops_newline = False
            position += text[position] == "\n"
        return len(text), text[position:]
