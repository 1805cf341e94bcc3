"""The parser of calls for models that address each message: text for a tool is a call, all other text is content."""

from collections import deque
from collections.abc import Mapping, Sequence

from stellarbyte_server.api.answers.call_arguments import ArgumentsReader, arguments_reader, parts_before
from stellarbyte_server.api.answers.call_parts import CallParts
from stellarbyte_server.api.answers.tool_parser import CallArguments, CallStart, Content, Piece
from stellarbyte_server.api.structured.offered_tools import OfferedTool
from stellarbyte_server.api.structured.tool_formats import HARMONY

_FUNCTIONS = "functions."  # the model's name for the tools of a request


class AddressedCallParser:
    """Parses one answer, in parts of any length; the division into parts does not change the result.

    A call begins with its arguments: a message that is cut off before them is dropped. A message to something other
    than one of `tools` is content, and so is one without arguments in JSON.
    """

    def __init__(self, tools: Mapping[str, OfferedTool]) -> None:
        self._tools = tools
        self._changes: deque[tuple[int, str]] = deque()
        self._position = 0  # characters read
        self._num_calls = 0
        self._tool: OfferedTool | None = None  # that is called; None: the text is content
        self._parts = CallParts(())  # of its arguments, before they certainly are some
        self._arguments: ArgumentsReader | None = None

    def address(self, recipients: Sequence[tuple[int, str]]) -> None:
        """Take recipients of the text to come, as of `Delta`, before its text."""
        self._changes += recipients

    def push(self, text: str) -> list[Piece]:
        """Add the next part of the answer. Returns the pieces that are certain now."""
        pieces: list[Piece] = []
        start, end = self._position, self._position + len(text)
        while self._changes and self._changes[0][0] < end:
            change, recipient = self._changes.popleft()
            self._add(text[self._position - start : change - start], pieces)
            self._position = change
            self._begin(recipient)
        self._add(text[self._position - start :], pieces)
        self._position = end
        return pieces

    def flush(self) -> list[Piece]:
        """End the answer. Returns the remaining pieces; no `push` may follow."""
        return []

    def _begin(self, recipient: str) -> None:
        self._tool = self._tools.get(recipient.removeprefix(_FUNCTIONS))
        self._arguments = None
        if self._tool is not None:
            self._parts = CallParts(parts_before(self._tool, HARMONY))

    def _add(self, text: str, pieces: list[Piece]) -> None:
        """A part of one message."""
        position = 0
        while self._tool is not None and self._arguments is None and position < len(text):
            position = self._read_opening(self._tool, text, position, pieces)
        if position == len(text):
            return
        if self._arguments is None:
            pieces.append(Content(text[position:]))
        elif not self._arguments.is_complete:
            _, said = self._arguments.read(text, position)
            if said:
                pieces.append(CallArguments(self._num_calls - 1, said))

    def _read_opening(self, tool: OfferedTool, text: str, position: int, pieces: list[Piece]) -> int:
        if not self._parts.push(text[position]):
            if self._parts.text:
                pieces.append(Content(self._parts.text))
            self._tool = None
            return position
        if self._parts.is_complete:
            pieces.append(CallStart(self._num_calls, tool.name, tool.is_custom))
            self._num_calls += 1
            self._arguments = arguments_reader(tool, HARMONY)
            if self._arguments.opening:
                pieces.append(CallArguments(self._num_calls - 1, self._arguments.opening))
        return position + 1
