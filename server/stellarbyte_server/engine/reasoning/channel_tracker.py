"""Where an answer in harmony's format stands: in which part of which message. The only place that decides it.

The format: https://cookbook.openai.com/articles/openai-harmony.
"""

import enum
import re
from typing import NamedTuple

from stellarbyte_server.protocol.request import Channels
from stellarbyte_server.tokens.token_bytes import TokenBytes

_ROLE = b"assistant"
_BEFORE_CHANNEL = re.compile(rb"\s*(t|to|to=\S*\s*)?")  # what may follow the role, or the start of it
_RECIPIENT = re.compile(r"\bto=(\S+)")
_MAX_HEADER_BYTES = 256  # of either side of CHANNEL; the rest says nothing
_FUNCTIONS = "functions."  # of a recipient that is a tool of the request


class Stage(enum.IntEnum):
    BETWEEN = 0  # a message has ended, and none has begun
    HEADER = 1
    TEXT = 2


class Kind(enum.IntEnum):
    REASONING = 0
    COMMENT = 1  # for the user, before the answer
    ANSWER = 2  # for the user, or a call


class ChannelPlace(NamedTuple):
    """All that a tracker remembers. Of a header: what was written before CHANNEL, and after it (None: it has not come).
    Of a text: its kind and its recipient ("": the user)."""

    stage: Stage = Stage.BETWEEN
    before: bytes = b""
    after: bytes | None = None
    kind: Kind = Kind.ANSWER
    recipient: str = ""
    num_tokens: int = 0  # of the reasoning
    num_pending: int = 0  # since the role was complete, in a header


class Read(enum.IntEnum):
    """What a token was."""

    MARK = 0
    HEADER = 1
    BEGIN = 2  # MESSAGE: a text begins
    TEXT = 3
    BARE = 4  # text without a header before it; text that was a HEADER's may be part of it


class ChannelTracker:
    """Follows the tokens of one answer. Engine thread only.

    A model may leave marks out: CHANNEL or START begins a message even if the one before has not ended, and text where
    a header cannot stand is for the user.
    """

    def __init__(self, channels: Channels, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._channels = channels
        self._ends = frozenset({channels.end_id, *channels.final_ids})
        self._next_of_role = self._next_of(channels.role_token_ids)
        self._next_of_analysis = self._next_of((*channels.analysis_token_ids, channels.message_id))
        self._next_of_comment = self._next_of((*channels.commentary_token_ids, channels.message_id))
        self.place = ChannelPlace()
        for token_id in channels.begun:
            self.push(token_id)

    def _next_of(self, token_ids: tuple[int, ...]) -> dict[bytes, int]:
        """The token that goes on, by the bytes that are written."""
        written = b""
        following: dict[bytes, int] = {}
        for token_id in token_ids:
            following[written] = token_id
            written += self._token_bytes[token_id]
        return following

    @property
    def _is_in_role(self) -> bool:
        """In a header whose role is not complete."""
        place = self.place
        return place.stage is Stage.HEADER and place.after is None and not place.before.startswith(_ROLE)

    @property
    def is_reasoning(self) -> bool:
        """The next token is of the reasoning or of a comment, or of what comes up to the next header's role."""
        place = self.place
        if place.stage is Stage.TEXT:
            return place.kind is not Kind.ANSWER
        return place.stage is Stage.BETWEEN or self._is_in_role

    @property
    def is_answering(self) -> bool:
        return self.place.stage is Stage.TEXT and self.place.kind is Kind.ANSWER

    @property
    def num_tokens(self) -> int:
        """Tokens of the reasoning, without headers and marks."""
        return self.place.num_tokens

    @property
    def num_pending(self) -> int:
        """As of `Tracker`."""
        return self.place.num_pending

    def opening(self, *, is_spent: bool) -> tuple[int, ...]:
        """As of `Tracker`: the headers of the reasoning, and of comments."""
        before, after = self.place.before, self.place.after
        if before != _ROLE:
            return ()
        headers = [] if is_spent else [self._next_of_analysis]
        if self._channels.may_comment:
            headers.append(self._next_of_comment)
        if after is None:
            return (self._channels.channel_id,) if headers else ()
        return tuple(header[after] for header in headers if after in header)

    def reserved(self) -> tuple[int, ...]:
        """As of `Tracker`."""
        place = self.place
        if place.stage is not Stage.HEADER or place.after is None or place.after not in self._next_of_analysis:
            return ()
        return (self._next_of_analysis[place.after],)

    def forced(self, *, is_spent: bool, has_grammar: bool) -> int | None:
        """As of `Tracker`."""
        place = self.place
        if place.stage is Stage.TEXT:
            return self._channels.end_id if is_spent and place.kind is Kind.REASONING else None
        if not (is_spent or has_grammar):
            return None
        return self._channels.start_id if place.stage is Stage.BETWEEN else self._next_of_role.get(place.before)

    def barred(self, vocab_size: int) -> frozenset[int]:
        """As of `Tracker`: the marks that do not end a text, and those that end the answer."""
        channels = self._channels
        marks = {channels.start_id, channels.channel_id, channels.message_id, *channels.final_ids}
        if channels.constrain_id is not None:
            marks.add(channels.constrain_id)
        return frozenset(token_id for token_id in marks if token_id < vocab_size)

    def push(self, token_id: int) -> Read:
        """Take the next token."""
        channels, place = self._channels, self.place
        if token_id == channels.message_id:
            return self._read_message()
        if token_id == channels.channel_id:
            self._read_channel()
        elif token_id == channels.start_id:
            self.place = ChannelPlace(Stage.HEADER, num_tokens=place.num_tokens)
        elif token_id in self._ends:
            self.place = ChannelPlace(num_tokens=place.num_tokens)
        elif token_id == channels.constrain_id:
            if place.stage is Stage.HEADER and place.after is not None:
                self.place = place._replace(after=place.after + b" ", num_pending=place.num_pending + 1)
        else:
            return self._read_text(self._token_bytes[token_id])
        return Read.MARK

    def _read_message(self) -> Read:
        place = self.place
        if place.stage is Stage.TEXT:
            return Read.MARK
        kind, recipient = _kind(place.before, place.after)
        self.place = ChannelPlace(Stage.TEXT, kind=kind, recipient=recipient, num_tokens=place.num_tokens)
        return Read.BEGIN

    def _read_channel(self) -> None:
        place = self.place
        if place.stage is not Stage.HEADER:
            place = ChannelPlace(Stage.HEADER, before=_ROLE, num_tokens=place.num_tokens)
        after = b"" if place.after is None else place.after + b" "
        self.place = place._replace(after=after, num_pending=place.num_pending + 1)

    def _read_text(self, data: bytes) -> Read:
        place = self.place
        if place.stage is Stage.TEXT:
            if place.kind is Kind.REASONING:
                self.place = place._replace(num_tokens=place.num_tokens + 1)
            return Read.TEXT
        if place.stage is Stage.HEADER and place.after is not None:
            after = (place.after + data)[:_MAX_HEADER_BYTES]
            self.place = place._replace(after=after, num_pending=place.num_pending + 1)
            return Read.HEADER
        before = place.before + data
        if place.stage is Stage.BETWEEN and not data.strip() and len(before) <= _MAX_HEADER_BYTES:
            self.place = place._replace(before=before)
            return Read.HEADER
        is_begun = before.startswith(_ROLE)
        is_bare = len(before) > _MAX_HEADER_BYTES or (is_begun and not _BEFORE_CHANNEL.fullmatch(before[len(_ROLE) :]))
        if place.stage is Stage.BETWEEN or is_bare:
            self.place = ChannelPlace(Stage.TEXT, num_tokens=place.num_tokens)
            return Read.BARE
        num_pending = place.num_pending + 1 if is_begun and before != _ROLE else 0
        self.place = place._replace(before=before, num_pending=num_pending)
        return Read.HEADER

    def bare(self, place: ChannelPlace, token_id: int) -> bytes:
        """The text that shows that no header comes, if this token does so in this place."""
        text = place.before + self._token_bytes[token_id]
        return text if place.stage is Stage.BETWEEN else text.removeprefix(_ROLE)


def _kind(before: bytes, after: bytes | None) -> tuple[Kind, str]:
    """The kind and the recipient of the message with this header."""
    channel = "" if after is None else after.decode(errors="replace")
    found = _RECIPIENT.search(before.removeprefix(_ROLE).decode(errors="replace")) or _RECIPIENT.search(channel)
    recipient = "" if found is None else found[1]
    name = channel.split(maxsplit=1)[0] if channel.strip() else ""
    if name == "analysis" and not recipient.startswith(_FUNCTIONS):  # tools of the model's own training, such as python
        return Kind.REASONING, ""
    return Kind.COMMENT if name == "commentary" and not recipient else Kind.ANSWER, recipient
