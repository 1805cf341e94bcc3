"""Incremental readers for arguments written as tagged parameters: see `structured.tagged_parameters`."""

import json
from collections.abc import Mapping

from stellarbyte_server.api.structured.tagged_parameters import VALUE_END, Kind


class Ending:
    """Finds the first end mark in a text that arrives in parts. The mark's first character must not recur in it."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._num_matched = 0

    def read(self, text: str, position: int) -> tuple[int, str, bool]:
        """The position reached, the text that is certainly before the mark, and whether the mark is complete."""
        certain: list[str] = []
        mark = self._mark
        while position < len(text):
            if self._num_matched == 0:
                found = text.find(mark[0], position)
                if found < 0:
                    certain.append(text[position:])
                    position = len(text)
                    break
                certain.append(text[position:found])
                position, self._num_matched = found + 1, 1
            elif text[position] == mark[self._num_matched]:
                position, self._num_matched = position + 1, self._num_matched + 1
                if self._num_matched == len(mark):
                    return position, "".join(certain), True
            else:
                certain.append(mark[: self._num_matched])
                self._num_matched = 0
        return position, "".join(certain), False


class TaggedInput:
    """The text of the only parameter, after its opening tag."""

    opening = ""

    def __init__(self) -> None:
        self.is_complete = False
        self._is_begun = False
        self._ending = Ending(VALUE_END)

    def read(self, text: str, position: int) -> tuple[int, str]:
        if not self._is_begun and position < len(text):
            self._is_begun = True
            position += text[position] == "\n"
        position, said, self.is_complete = self._ending.read(text, position)
        return position, said


class TaggedArguments:
    """All parameters as a JSON object, up to the function's closing tag."""

    opening = ""

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self.is_complete = False
        self._kinds = kinds
        self._is_begun = False  # the object's opening brace was emitted
        self._tag: list[str] = []
        self._value: _Value | None = None  # being read

    def read(self, text: str, position: int) -> tuple[int, str]:
        said: list[str] = []
        while position < len(text) and not self.is_complete:
            if self._value is None:
                position = self._read_tag(text, position, said)
            else:
                position = self._value.read(text, position, said)
                if self._value.is_complete:
                    self._value = None
        return position, "".join(said)

    def _read_tag(self, text: str, position: int, said: list[str]) -> int:
        end = text.find(">", position)
        if end < 0:
            self._tag.append(text[position:])
            return len(text)
        tag = "".join([*self._tag, text[position:end]]).strip()
        self._tag = []
        if tag.startswith("<parameter="):
            name = tag.removeprefix("<parameter=")
            said.append(f"{', ' if self._is_begun else '{'}{json.dumps(name, ensure_ascii=False)}: ")
            self._is_begun = True
            self._value = _Value(self._kinds.get(name, "any"))
        else:  # </function
            said.append("}" if self._is_begun else "{}")
            self.is_complete = True
        return end + 1


class _Value:
    def __init__(self, kind: Kind) -> None:
        self.is_complete = False
        self._kind = kind
        self._ending = Ending(VALUE_END)
        self._is_begun = False
        self._held: list[str] = []  # JSON or text, not known yet
        self._is_text = False  # the opening quote was emitted

    def read(self, text: str, position: int, said: list[str]) -> int:
        if not self._is_begun:
            self._is_begun = True
            if text[position] == "\n":
                return position + 1
        position, value, self.is_complete = self._ending.read(text, position)
        if self._kind == "json":
            said.append(value)
        elif self._is_text or self._kind == "text":
            self._say_text(value, said)
        else:
            self._hold(value, said)
        return position

    def _hold(self, value: str, said: list[str]) -> None:
        self._held.append(value)
        if self._kind == "nullable":
            held = "".join(self._held)
            if not "null".startswith(held):
                self._say_text(held, said)
            elif self.is_complete:
                self._say_whole(held, held == "null", said)
        elif self.is_complete:
            held = "".join(self._held)
            self._say_whole(held, _is_json(held), said)

    def _say_whole(self, value: str, is_json: bool, said: list[str]) -> None:
        if is_json:
            said.append(value)
        else:
            self._say_text(value, said)

    def _say_text(self, value: str, said: list[str]) -> None:
        if not self._is_text:
            self._is_text = True
            said.append('"')
        said.append(json.dumps(value, ensure_ascii=False)[1:-1])
        if self.is_complete:
            said.append('"')


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(constant)  # NaN and Infinity are not JSON
