"""The tool parser: divides the text of an answer into content and tool calls, as it arrives.

Each character is examined a bounded number of times, and held back only while it may be part of a call.
"""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from stellarbyte_server.api.answers.call_arguments import (
    ArgumentsReader,
    arguments_reader,
    parts_after,
    parts_before,
)
from stellarbyte_server.api.answers.call_parts import SPACE, CallParts, parts_of
from stellarbyte_server.api.structured.offered_tools import OfferedTool
from stellarbyte_server.api.structured.tool_formats import CALL_ID, ToolFormat


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class Content:
    """A part of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The start of a call; the first call has index 0. Ids are unique."""

    index: int
    name: str
    is_custom: bool = False
    id: str = field(default_factory=new_call_id, compare=False)


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A part of the arguments of call `index`: JSON, or the input of a custom tool."""

    index: int
    text: str


Piece = Content | CallStart | CallArguments


class ToolCallParser:
    """Parses one answer, in parts of any length; the division into parts does not change the result.

    A call is a text in `format` that calls one of `tools`. All other text is content, unchanged, except that the
    newline before a call and white space that stands alone before, between or after calls are dropped. A truncated
    call is returned as far as it was written; if it ends before its arguments begin, it is content, or dropped if the
    answer must be a call (`required`).
    """

    def __init__(self, format: ToolFormat, tools: Mapping[str, OfferedTool], *, required: bool = False) -> None:
        self._format = format
        self._mark = format.trigger or format.prefix
        self._may_begin = re.compile(f"[\n{re.escape(format.trigger[0])}]") if format.trigger else None
        self._name_parts = (*parts_of(format.begin), None)
        self._name_end, after_name = format.name_end[0], format.name_end[1:]
        if CALL_ID in after_name:  # an id is matched like a name
            before, _, after_name = after_name.partition(CALL_ID)
            self._after_name: tuple[str | None, ...] = (*parts_of(before), None, *parts_of(after_name[1:]))
        else:
            self._after_name = parts_of(after_name)
        self._tools = tools
        self._required = required
        self._num_calls = 0
        self._read = self._read_space  # the state: how the next character is read
        self._space: list[str] = []  # held back: white space that may stand alone
        self._before = ""  # held back: dropped if a call follows
        self._num_matched = 0  # characters of the mark
        self._name = CallParts(())  # of a call, up to and including its name
        self._parts = CallParts(())  # after the name, or after the arguments
        self._tool: OfferedTool | None = None
        self._arguments: ArgumentsReader | None = None

    def push(self, text: str) -> list[Piece]:
        """Add the next part of the answer. Returns the pieces that are certain now."""
        pieces: list[Piece] = []
        self._feed(text, pieces)
        return pieces

    def flush(self) -> list[Piece]:
        """End the answer. Returns the remaining pieces; no `push` may follow."""
        held = ""
        if self._read == self._read_space and not self._num_calls:
            held = "".join(self._space)
        elif self._read == self._read_mark:
            held = self._before + self._mark[: self._num_matched]
        elif self._read == self._read_name:
            held = self._before + self._name.text
        elif self._read == self._read_after_name:
            held = self._before + self._name.text + self._parts.text
        return [Content(held)] if held and not self._required else []

    def _feed(self, text: str, pieces: list[Piece]) -> None:
        position = 0
        while position < len(text):
            position = self._read(text, position, pieces)

    # The states. Each method reads from a position, returns the position reached, and may set the next state.

    def _read_space(self, text: str, position: int, pieces: list[Piece]) -> int:
        """At the start of the answer, or after a call."""
        start = position
        while position < len(text) and text[position] in SPACE:
            position += 1
        self._space.append(text[start:position])
        if position == len(text):
            return position
        self._before = "".join(self._space)
        self._space = []
        is_whole_answer = not self._format.trigger
        if self._mark and text[position] == self._mark[0] and not (is_whole_answer and self._num_calls):
            self._expect_mark()
        elif is_whole_answer and not self._num_calls:
            self._expect_name()
        else:
            self._be_content(self._before, pieces)
        return position

    def _read_content(self, text: str, position: int, pieces: list[Piece]) -> int:
        found = None if self._may_begin is None else self._may_begin.search(text, position)
        end = len(text) if found is None else found.start()
        if end > position:
            pieces.append(Content(text[position:end]))
        if found is None:
            return end
        self._before = "\n" if found[0] == "\n" else ""
        self._expect_mark()
        return end + len(self._before)

    def _expect_mark(self) -> None:
        self._num_matched = 0
        self._read = self._read_mark

    def _read_mark(self, text: str, position: int, pieces: list[Piece]) -> int:
        if text[position] != self._mark[self._num_matched]:
            # A mark's first character does not recur in it, so that another mark can only begin here.
            self._be_content(self._before + self._mark[: self._num_matched], pieces)
            return position
        self._num_matched += 1
        if self._num_matched == len(self._mark):
            self._before += self._mark
            self._expect_name(parts_of(self._format.opening))
        return position + 1

    def _expect_name(self, opening: tuple[str, ...] = ()) -> None:
        self._name = CallParts((*opening, *self._name_parts), self._name_end)
        self._read = self._read_name

    def _read_name(self, text: str, position: int, pieces: list[Piece]) -> int:
        name = self._name
        if not name.push(text[position]):
            self._be_content_again(name.text, pieces)
            return position
        if name.is_complete:
            self._tool = self._tools.get(name.name)
            if self._tool is None:
                self._be_content_again(name.text, pieces)
                return position + 1
            self._parts = CallParts((*self._after_name, *parts_before(self._tool, self._format)), self._name_end)
            self._read = self._read_after_name
            if self._parts.is_complete:
                self._start_call(pieces)
        return position + 1

    def _read_after_name(self, text: str, position: int, pieces: list[Piece]) -> int:
        if not self._parts.push(text[position]):
            self._be_content_again(self._name.text + self._parts.text, pieces)
            return position
        if self._parts.is_complete:
            self._start_call(pieces)
        return position + 1

    def _start_call(self, pieces: list[Piece]) -> None:
        assert self._tool is not None
        pieces.append(CallStart(self._num_calls, self._tool.name, self._tool.is_custom))
        self._num_calls += 1
        self._arguments = arguments_reader(self._tool, self._format)
        if self._arguments.opening:
            pieces.append(CallArguments(self._num_calls - 1, self._arguments.opening))
        self._read = self._read_arguments

    def _read_arguments(self, text: str, position: int, pieces: list[Piece]) -> int:
        assert self._arguments is not None and self._tool is not None
        position, said = self._arguments.read(text, position)
        if said:
            pieces.append(CallArguments(self._num_calls - 1, said))
        if self._arguments.is_complete:
            end = self._format.end
            if self._format.arguments == "tags":
                end = end.removeprefix("</function>")
            self._parts = CallParts((*parts_after(self._tool, self._format), *parts_of(end)))
            self._read = self._read_end
            self._end_call()
        return position

    def _read_end(self, text: str, position: int, pieces: list[Piece]) -> int:
        end = self._parts
        if not end.push(text[position]):
            self._read = self._read_space
            self._feed(end.unfinished, pieces)
            return position
        self._end_call()
        return position + 1

    def _end_call(self) -> None:
        """Leave the call if its end has been read completely."""
        if self._parts.is_complete:
            self._read = self._read_between if self._format.is_list else self._read_space

    def _read_between(self, text: str, position: int, pieces: list[Piece]) -> int:
        """After a call in a list of calls."""
        del pieces
        if text[position] == self._format.closing:
            self._read = self._read_space
        elif text[position] == (self._format.separator or "").strip():
            self._before = text[position]
            self._expect_name()
        elif text[position] not in SPACE:
            self._read = self._read_space
            return position
        return position + 1

    def _be_content_again(self, text: str, pieces: list[Piece]) -> None:
        """The text is not a call: its mark is content, and the rest is read again because it may contain a call."""
        self._be_content(self._before, pieces)
        self._feed(text, pieces)

    def _be_content(self, text: str, pieces: list[Piece]) -> None:
        if text:
            pieces.append(Content(text))
        self._read = self._read_content
