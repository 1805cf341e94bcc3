"""The objects of a JSON array, decoded while the text is read."""

import json
from collections.abc import Iterator
from typing import Any

_WHITESPACE = " \t\r\n"


class JsonArrayError(ValueError):
    """str() is the end of a sentence that starts with the line."""


class JsonArray:
    """Iterates once over the objects of an array, or over the one object that the text is.

    Attributes:
        line: where the last object starts, or where the error is. Counted from 1.
    """

    def __init__(self, pieces: Iterator[str], max_characters: int) -> None:
        """A text that has no whole object in `max_characters` is refused."""
        self._pieces = pieces
        self._max_characters = max_characters
        self._decoder = json.JSONDecoder()
        self._text, self._at = "", 0  # what was read and not yet decoded starts at `at`
        self._passed = 0  # newlines before `at`
        self.line = 1

    def __iter__(self) -> Iterator[Any]:
        is_array = self._next_character() == "["
        if is_array:
            self._advance(1)
        if not is_array or self._next_character() != "]":
            yield self._object()
            while is_array and self._next_character() == ",":
                self._advance(1)
                self._next_character()
                yield self._object()
        if is_array:
            if self._next_character() != "]":
                raise self._refuse("is not valid JSON: ',' or ']' is missing")
            self._advance(1)
        if self._next_character():
            raise self._refuse("is not valid JSON: there is text after its end")

    def _refuse(self, reason: str) -> JsonArrayError:
        self.line = self._passed + 1
        return JsonArrayError(reason)

    def _advance(self, num_characters: int) -> None:
        self._passed += self._text.count("\n", self._at, self._at + num_characters)
        self._at += num_characters

    def _next_character(self) -> str:
        """The next character that is not a space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _WHITESPACE:
                self._advance(1)
            if self._at < len(self._text):
                return self._text[self._at]
            self._text, self._at = next(self._pieces, ""), 0
            if not self._text:
                return ""

    def _object(self) -> Any:
        """The object at `at`."""
        if self._next_character() != "{":
            raise self._refuse("must start an object")
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise self._refuse("is nested too deeply") from error
            except json.JSONDecodeError as error:
                piece = next(self._pieces, None)  # the object may go on there
                if piece is None:
                    self._advance(error.pos - self._at)
                    raise self._refuse(f"is not valid JSON: {error.msg}") from error
                self._text, self._at = self._text[self._at :] + piece, 0
                if len(self._text) > self._max_characters:
                    raise self._refuse("starts an object that is too long, or is not valid JSON") from error
            else:
                self.line = self._passed + 1
                self._advance(end - self._at)
                return value
