"""Matches the fixed parts of a call, such as its braces and keys, character by character."""

import re

from stellarbyte_server.api.contract.bodies.tools import MAX_NAME_CHARACTERS

SPACE = " \t\n\r"
_NAME_CHARACTER = re.compile("[a-zA-Z0-9_-]")
_PART = re.compile(r'"\w+"|[{}\[\]:,"]|[^\s{}\[\]:,"]+')


def parts_of(text: str) -> tuple[str, ...]:
    """The parts between which space means nothing: `, "arguments": ` has three."""
    return tuple(_PART.findall(text))


class CallParts:
    """Matches texts with any space before each; None is a tool's name, which `name_end` follows at once."""

    def __init__(self, parts: tuple[str | None, ...], name_end: str = "") -> None:
        self._parts = parts
        self._name_end = name_end
        self._number = 0  # of the part that is being matched
        self._num_matched = 0  # characters of it
        self._names: list[list[str]] = []
        self._text: list[str] = []
        self._finished = 0  # characters up to the end of the last whole part

    def push(self, character: str) -> bool:
        """Whether it goes on with that character, which is taken only then."""
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
        """The first one."""
        return "".join(self._names[0])

    @property
    def text(self) -> str:
        """All that was taken."""
        return "".join(self._text)

    @property
    def unfinished(self) -> str:
        """What was taken after the last whole part."""
        return "".join(self._text[self._finished :])
