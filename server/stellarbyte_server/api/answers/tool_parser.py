"""The tool parser divides the text of an answer into content and tool calls, as it arrives.

Every character is looked at a bounded number of times, and none is held back but what may still become a call.
"""

import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field

from stellarbyte_server.api.contract.bodies.tools import MAX_NAME_CHARACTERS
from stellarbyte_server.api.structured.tool_calls import ToolFormat

_SPACE = " \t\n\r"
_NAME_CHARACTER = re.compile("[a-zA-Z0-9_-]")
_STRUCTURE = re.compile(r'["{}\[\]]')
_STRING_END = re.compile(r'["\\]')


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class Content:
    """A part of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; the first one has index 0. Every call has an id of its own."""

    index: int
    name: str
    id: str = field(default_factory=new_call_id, compare=False)


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A part of the arguments of the call with that index, as the model wrote it."""

    index: int
    text: str


Piece = Content | CallStart | CallArguments


class ToolCallParser:
    """Reads one answer, in parts of any length; how it is cut changes nothing in what the pieces say together.

    A call is what is written in `format` and calls one of `names`; all else is content, as the model wrote it, but
    for the newline before a call and space that stands alone before, between or after calls. Of a call that is cut
    off there is what was written; where not even its name and the start of its arguments were, that is content.
    """

    def __init__(self, format: ToolFormat, names: Collection[str]) -> None:
        self._trigger = format.trigger
        self._head_parts = ("{", '"name"', ":", '"', None, ",", f'"{format.arguments_key}"', ":", "{")
        self._tail_parts = tuple(part for part in ("}", format.end.strip()) if part)
        self._may_begin = re.compile(f"[\n{re.escape(format.trigger[0])}]") if format.trigger else None
        self._names = frozenset(names)
        self._num_calls = 0
        self._read = self._read_space  # what the next character is read as
        self._space: list[str] = []  # held back: space that may stand alone
        self._before = ""  # held back: what is dropped before a call
        self._num_matched = 0  # characters of the trigger
        self._parts = _Parts(())  # of the head or the tail of a call
        self._depth = 0  # of the arguments
        self._is_string = False
        self._is_escaped = False

    def push(self, text: str) -> list[Piece]:
        """What has become certain with `text`."""
        pieces: list[Piece] = []
        self._feed(text, pieces)
        return pieces

    def flush(self) -> list[Piece]:
        """What is left at the end of the answer; nothing may be pushed after it."""
        held = ""
        if self._read == self._read_space and not self._num_calls:
            held = "".join(self._space)
        elif self._read == self._read_trigger:
            held = self._before + self._trigger[: self._num_matched]
        elif self._read == self._read_head:
            held = self._before + self._trigger + self._parts.text
        return [Content(held)] if held else []

    def _feed(self, text: str, pieces: list[Piece]) -> None:
        position = 0
        while position < len(text):
            position = self._read(text, position, pieces)

    # Each reads from a position on and returns how far it came, with another one to go on if it came to its end.

    def _read_space(self, text: str, position: int, pieces: list[Piece]) -> int:
        """At the start of the answer, or after a call."""
        start = position
        while position < len(text) and text[position] in _SPACE:
            position += 1
        self._space.append(text[start:position])
        if position == len(text):
            return position
        self._before = "".join(self._space)
        self._space = []
        if self._trigger and text[position] == self._trigger[0]:
            self._expect_trigger()
        elif not self._trigger and not self._num_calls:
            self._expect_head()
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
        self._expect_trigger()
        return end + len(self._before)

    def _expect_trigger(self) -> None:
        self._num_matched = 0
        self._read = self._read_trigger

    def _read_trigger(self, text: str, position: int, pieces: list[Piece]) -> int:
        if text[position] != self._trigger[self._num_matched]:
            # Its first character is nowhere else in a trigger, so another one can only begin here.
            self._be_content(self._before + self._trigger[: self._num_matched], pieces)
            return position
        self._num_matched += 1
        if self._num_matched == len(self._trigger):
            self._expect_head()
        return position + 1

    def _expect_head(self) -> None:
        self._parts = _Parts(self._head_parts)
        self._read = self._read_head

    def _read_head(self, text: str, position: int, pieces: list[Piece]) -> int:
        head = self._parts
        if not head.push(text[position]) or (head.is_complete and head.name not in self._names):
            self._be_content(self._before + self._trigger, pieces)
            self._feed(head.text[: -1 if head.is_complete else None], pieces)
            return position
        if not head.is_complete:
            return position + 1
        pieces.append(CallStart(self._num_calls, head.name))
        self._num_calls += 1
        self._depth = 0
        self._read = self._read_arguments
        return position  # at their brace

    def _read_arguments(self, text: str, position: int, pieces: list[Piece]) -> int:
        start = position
        while position < len(text):
            if self._is_escaped:
                self._is_escaped = False
                position += 1
                continue
            found = (_STRING_END if self._is_string else _STRUCTURE).search(text, position)
            if found is None:
                position = len(text)
                break
            position = found.end()
            if found[0] == '"':
                self._is_string = not self._is_string
            elif found[0] == "\\":
                self._is_escaped = True
            else:
                self._depth += 1 if found[0] in "{[" else -1
                if self._depth == 0:
                    self._parts = _Parts(self._tail_parts)
                    self._read = self._read_tail
                    break
        pieces.append(CallArguments(self._num_calls - 1, text[start:position]))
        return position

    def _read_tail(self, text: str, position: int, pieces: list[Piece]) -> int:
        tail = self._parts
        is_tail = tail.push(text[position])
        if is_tail and not tail.is_complete:
            return position + 1
        self._read = self._read_space
        if is_tail:
            return position + 1
        self._feed(tail.unfinished, pieces)
        return position

    def _be_content(self, text: str, pieces: list[Piece]) -> None:
        if text:
            pieces.append(Content(text))
        self._read = self._read_content


class _Parts:
    """Matches texts with any space before each, character by character; None is a tool's name and its end."""

    def __init__(self, parts: tuple[str | None, ...]) -> None:
        self._parts = parts
        self._number = 0  # of the part that is being matched
        self._num_matched = 0  # characters of it
        self._name: list[str] = []
        self._text: list[str] = []
        self._finished = 0  # characters up to the end of the last whole part

    def push(self, character: str) -> bool:
        """Whether it goes on with that character, which is taken only then."""
        part = self._parts[self._number]
        is_end = False
        if part is None:
            is_end = character == '"'
            if not is_end:
                if len(self._name) == MAX_NAME_CHARACTERS or not _NAME_CHARACTER.match(character):
                    return False
                self._name.append(character)
        elif self._num_matched > 0 or character not in _SPACE:
            if part[self._num_matched] != character:
                return False
            self._num_matched += 1
            is_end = self._num_matched == len(part)
        self._text.append(character)
        if is_end:
            self._number += 1
            self._num_matched = 0
            self._finished = len(self._text)
        return True

    @property
    def is_complete(self) -> bool:
        return self._number == len(self._parts)

    @property
    def name(self) -> str:
        return "".join(self._name)

    @property
    def text(self) -> str:
        """All that was taken."""
        return "".join(self._text)

    @property
    def unfinished(self) -> str:
        """What was taken after the last whole part."""
        return "".join(self._text[self._finished :])
