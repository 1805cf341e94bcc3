"""Where the text of a prompt came from: which of it is the content of which message, and which the template's.

A template is a program, so the places of contents are found by rendering the chat once more with marks around them, and
only used if the result without its marks is the prompt.
"""

import re
import secrets
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from stellarbyte_server.api.contract.bodies.chat import ChatBody, Message
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.tokens.tokenizer import ChatTemplateError

Source = Literal["message", "template", "prompt", "tokenizer", "unknown"]
_TEXTS = ("content", "refusal", "reasoning_content", "reasoning")  # of a message


class Stretch(NamedTuple):
    """Successive characters of a prompt. `message`: index of the message; None: of no message."""

    source: Source
    text: str
    message: int | None = None


class _Span(NamedTuple):
    start: int
    end: int
    message: int


class _Marks:
    """Marks around the texts of messages, outside or inside of the whitespace at their ends, which a template may trim.

    They occur in no prompt, as they contain a random number.
    """

    def __init__(self, messages: Sequence[Message], *, inside: bool) -> None:
        self._nonce = f"q{secrets.token_hex(16)}q"
        self._inside = inside
        self._texts: list[tuple[int, str]] = []  # message, text between the marks
        self.messages = [self._marked(number, message) for number, message in enumerate(messages)]

    def _marked(self, number: int, message: Message) -> Message:
        update: dict[str, Any] = {}
        for field in _TEXTS:
            text = getattr(message, field)
            core = text.strip() if text is not None and self._inside else text
            if not core:
                continue
            lead, _, trail = text.partition(core)
            mark = f"{self._nonce}{len(self._texts)}"
            update[field] = f"{lead}{mark}o{core}{mark}c{trail}"
            self._texts.append((number, core))
        return message.model_copy(update=update)

    def spans(self, marked: str, text: str) -> list[_Span] | None:
        """The places of the messages' texts in a prompt, given it with marks; None if it is another text then."""
        pieces: list[str] = []
        found: list[tuple[int, int, bool]] = []  # number, place, whether it opens
        length = last = 0
        for match in re.finditer(rf"{self._nonce}(\d+)([oc])", marked):
            pieces.append(marked[last : match.start()])
            length, last = length + len(pieces[-1]), match.end()
            found.append((int(match[1]), length, match[2] == "o"))
        if "".join([*pieces, marked[last:]]) != text:
            return None
        return [span for span in self._between(found, text) if span.start < span.end]

    def _between(self, found: list[tuple[int, int, bool]], text: str) -> Iterator[_Span]:
        """If a template shows only a part of a text, its beginning or end is found by the mark that is left."""
        before, opened = 0, dict[int, int]()
        for place, (number, position, opens) in enumerate(found):
            message, core = self._texts[number]
            if opens:
                opened[number] = position
                after = found[place + 1] if place + 1 < len(found) else (-1, len(text), True)
                if after[0] != number or text[position : after[1]] != core:
                    yield _Span(position, position + _num_equal(core, text[position : after[1]]), message)
            elif opened.get(number) == before and text[before:position] == core:
                yield _Span(before, position, message)
            else:
                equal = _num_equal(core[::-1], text[before:position][::-1])
                yield _Span(position - equal, position, message)
            before = position


def _num_equal(first: str, second: str) -> int:
    """The length of the common beginning of two texts."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def stretches_of_chat(body: ChatBody, text: str, render: Callable[[ChatBody], str]) -> list[Stretch]:
    """What a chat's prompt consists of; one stretch of unknown source if the template does not let it be found."""
    for inside in (False, True):
        marks = _Marks(body.messages, inside=inside)
        try:
            marked = render(body.model_copy(update={"messages": marks.messages}))
        except (ChatTemplateError, ApiError):
            continue
        if (spans := marks.spans(marked, text)) is not None:
            return list(_filled(spans, text))
    return [Stretch("unknown", text)]


def _filled(spans: list[_Span], text: str) -> Iterator[Stretch]:
    """The spans in order, and the template's text between them."""
    last = 0
    for start, end, message in sorted(spans):
        start = max(start, last)  # a part that is the end of one mark's text and the beginning of another's
        if start >= end:
            continue
        if start > last:
            yield Stretch("template", text[last:start])
        yield Stretch("message", text[start:end], message)
        last = end
    if last < len(text):
        yield Stretch("template", text[last:])


def with_tokens(stretches: Sequence[Stretch], starts: Sequence[int | None]) -> list[tuple[Stretch, int, int]]:
    """Each stretch with its tokens, from one index to another: those whose first character it contains.

    `starts`: the place of each token's first character; None for those that the tokenizer adds, before or after.
    """
    inner = [start for start in starts if start is not None]
    first = next((i for i, start in enumerate(starts) if start is not None), len(starts))
    found = [(Stretch("tokenizer", ""), 0, first)] if first else []
    end, place = first, 0
    for number, stretch in enumerate(stretches, 1):
        place += len(stretch.text)
        start, end = end, first + (len(inner) if number == len(stretches) else bisect_left(inner, place))
        found.append((stretch, start, end))
    if end < len(starts):
        found.append((Stretch("tokenizer", ""), end, len(starts)))
    return found
