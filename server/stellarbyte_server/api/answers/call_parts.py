"""Matches the fixed parts of a call, such as its braces and keys, character by character."""

import re

from stellarbyte_server.api.contract.bodies.tools import MAX_NAME_CHARACTERS

SPACE = " \t\n\r"
_NAME_CHARACTER = re.compile("[a-zA-Z0-9_-]")
_PART = re.compile(r'"\w+"|[{}\[\]:,"]|[^\s{}\[\]:,"]+')


def parts_of(text: str) -> tuple[str, ...]:
    """Split a text into parts between which white space is insignificant: `, "arguments": ` has three."""
    return tuple(_PART.findall(text))


class CallParts:
    """Matches a sequence of parts, each after any white space. None is a tool's name, which ends at `name_end`."""

    def __init__(self, parts: tuple[str | None, ...], name_end: str = "") -> None:
        self._parts = parts
        self._name_end = name_end
        self._number = 0  # index of the current part
        self._num_matched = 0  # characters of the current part
        self._names: list[list[str]] = []
        self._text: list[str] = []
        self._finished = 0  # characters up to the end of the last complete part

    def push(self, character: str) -> bool:
        """Consume a character if it matches. Returns whether it did."""
        part = self._parts[self._number]
        is_end = False
        if part is None:
            if self._num_matched == 0:
                self._names.append([])
            name = self._names[-1]
            is_end = character == self._name_end
            if not is_end:
                if len(name) == MAX_NAME_CHARACTERS or not _NAME_CHARACTER.match(character):
                    return False
                name.append(character)
                self._num_matched += 1
        elif self._num_matched > 0 or character not in SPACE:
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
        """The first name."""
        return "".join(self._names[0])

    @property
    def text(self) -> str:
        """All consumed characters."""
        return "".join(self._text)

    @property
    def unfinished(self) -> str:
        """The characters consumed after the last complete part."""
        return "".join(self._text[self._finished :])
