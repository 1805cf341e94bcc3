"""Where an answer with marks around its reasoning stands: before, in or after it. The only place that decides it."""

import enum
from typing import NamedTuple

from stellarbyte_server.engine.reasoning.words import going_past
from stellarbyte_server.protocol.request import Reasoning
from stellarbyte_server.tokens.token_bytes import TokenBytes

_SPACE = b" \t\r\n"


class Phase(enum.IntEnum):
    BEGIN = 0  # only white space so far, and perhaps a part of the start mark
    REASONING = 1
    ANSWER = 2


class Place(NamedTuple):
    """All that a tracker remembers."""

    phase: Phase = Phase.BEGIN
    num_matched: int = 0  # bytes of the next mark that the text so far may end with
    num_tokens: int = 0  # of the reasoning, without its marks
    num_pending: int = 0  # the newest tokens, which may be white space before a mark, or a part of one


class Passed(NamedTuple):
    """The marks that a token completes: its bytes after each, None for one that it does not complete."""

    start: bytes | None = None
    end: bytes | None = None


_NONE = Passed()


class ReasoningTracker:
    """Follows the tokens of one answer. Engine thread only.

    A mark that is one token of its own is known by its id, wherever its text may stand; any other is known by its
    bytes, however they are divided into tokens. Reasoning is the first thing in an answer or not in it at all.
    """

    def __init__(self, reasoning: Reasoning, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._start, self._end = reasoning.start.encode(), reasoning.end.encode()
        self._start_id, self._end_id = reasoning.start_id, reasoning.end_id
        self._is_open = reasoning.is_open
        self._next_of_start = _next_of(reasoning.start_token_ids, token_bytes)
        self._next_of_end = _next_of(reasoning.end_token_ids, token_bytes)
        self.mark_ids = frozenset({reasoning.start_id, reasoning.end_id} - {None})
        self.num_end_bytes = len(self._end)
        self.place = Place()

    @property
    def is_reasoning(self) -> bool:
        """The next token belongs to the reasoning, or ends it."""
        return self.place.phase is Phase.REASONING or (self.place.phase is Phase.BEGIN and self._is_open)

    @property
    def is_answering(self) -> bool:
        return self.place.phase is Phase.ANSWER

    @property
    def num_tokens(self) -> int:
        """Tokens of the reasoning, if no mark comes of the newest ones."""
        return self.place.num_tokens + (self.place.num_pending if self.is_reasoning else 0)

    @property
    def num_pending(self) -> int:
        """As of `Tracker`."""
        return self.place.num_pending

    def opening(self, *, is_spent: bool) -> tuple[int, ...]:
        """As of `Tracker`; at its limit, reasoning begins and ends at once."""
        del is_spent
        following = self._next_of_start.get(self.place.num_matched)
        return () if following is None else (following,)

    def reserved(self) -> tuple[int, ...]:
        """As of `Tracker`: no second reasoning can begin."""
        return ()

    def forced(self, *, is_spent: bool, has_grammar: bool) -> int | None:
        """As of `Tracker`."""
        del has_grammar
        return self._next_of_end.get(self.place.num_matched, self._next_of_end[0]) if is_spent else None

    def barred(self, vocab_size: int) -> frozenset[int]:
        """As of `Tracker`: the grammar would not see what comes after an end mark of text in the same token."""
        if self._end_id is not None:
            return frozenset()
        return going_past(self._token_bytes, self._end, self.place.num_matched, vocab_size)

    def push(self, token_id: int) -> Passed:
        """Take the next token."""
        place = self.place
        if place.phase is Phase.ANSWER:
            return _NONE
        if place.phase is Phase.REASONING:
            return self._read_reasoning(token_id, self._token_bytes[token_id])
        if self._start_id is not None:
            if token_id == self._start_id:
                self.place = Place(Phase.REASONING)
                return Passed(start=b"")
            if token_id != self._end_id and not self._token_bytes[token_id].strip(_SPACE):
                self.place = place._replace(num_pending=place.num_pending + 1)
                return _NONE
            return self._go_on(token_id, b"")
        return self._read_start(token_id)

    def finish(self) -> None:
        """No token comes any more, so no mark does."""
        self.place = self.place._replace(num_tokens=self.num_tokens, num_pending=0)

    def _read_start(self, token_id: int) -> Passed:
        """A token at the beginning, where the start mark is known by its bytes."""
        data, place = self._token_bytes[token_id], self.place
        matched = place.num_matched
        for position, byte in enumerate(data):
            if byte == self._start[matched]:
                matched += 1
                if matched == len(self._start):
                    rest = data[position + 1 :]
                    self.place = Place(Phase.REASONING)
                    return Passed(rest, self._read_reasoning(token_id, rest).end if rest else None)
            elif matched or byte not in _SPACE:
                return self._go_on(token_id, self._start[: place.num_matched])
        self.place = place._replace(num_matched=matched, num_pending=place.num_pending + 1)
        return _NONE

    def _go_on(self, token_id: int, before: bytes) -> Passed:
        """No start mark comes any more; `before` is the part of one that had been read."""
        if not self._is_open:
            self.place = Place(Phase.ANSWER)
            return _NONE
        self.place = Place(Phase.REASONING, num_tokens=self.place.num_pending)
        if before and self._end_id is None:  # it may be a part of the end mark as well
            num_matched = self._match_end(before, 0)[0]
            self.place = self.place._replace(num_matched=num_matched)
        return self._read_reasoning(token_id, self._token_bytes[token_id])

    def _read_reasoning(self, token_id: int, data: bytes) -> Passed:
        place = self.place
        if self._end_id is not None:
            if token_id == self._end_id:
                self.place = Place(Phase.ANSWER, num_tokens=place.num_tokens)
                return Passed(end=b"")
            self.place = place._replace(num_tokens=place.num_tokens + 1)
            return _NONE
        matched, num_read = self._match_end(data, place.num_matched)
        mark_start = num_read - matched  # in this token; negative: in an earlier one
        num_tokens, num_pending = place.num_tokens, place.num_pending
        if mark_start >= 0:  # all earlier tokens are reasoning
            num_tokens, num_pending = num_tokens + num_pending, 0
        if matched == len(self._end):
            self.place = Place(Phase.ANSWER, num_tokens=num_tokens + (mark_start > 0))
            return Passed(end=data[num_read:])
        if mark_start > 0 or not matched:
            num_tokens += 1
        else:
            num_pending += 1
        self.place = Place(Phase.REASONING, matched, num_tokens, num_pending)
        return _NONE

    def _match_end(self, data: bytes, matched: int) -> tuple[int, int]:
        """How much of the end mark is matched after the data, or when it was whole; and how many bytes were read.

        Its first byte is in no other place of it, so it can begin anew nowhere else.
        """
        for position, byte in enumerate(data):
            matched = matched + 1 if byte == self._end[matched] else int(byte == self._end[0])
            if matched == len(self._end):
                return matched, position + 1
        return matched, len(data)


def _next_of(token_ids: tuple[int, ...], token_bytes: TokenBytes) -> dict[int, int]:
    """The token that goes on with a mark, by how many of its bytes are written; 0: the first."""
    following: dict[int, int] = {}
    written = b""
    for token_id in token_ids:
        following[len(written.lstrip())] = token_id
        written += token_bytes[token_id]
    return following
