"""The text of an answer in harmony's format: without headers, divided into reasoning and answer as its tokens come."""

from stellarbyte_server.engine.reasoning.channel_tracker import ChannelPlace, ChannelTracker, Kind, Read, Stage
from stellarbyte_server.engine.reasoning.divided_text import Apart, end_of
from stellarbyte_server.engine.text import TextStream
from stellarbyte_server.protocol.messages import TokenLogprob

_BETWEEN_TEXTS = "\n\n"  # of several messages to the user, or with reasoning


class ChannelText:
    """A `TextStream` for the answer, and what is beside it. Engine thread only; one instance per request.

    The answer's text is that of messages to the user and of calls, in their order; `take` says where which begins. Stop
    strings are looked for in it only.
    """

    def __init__(self, text: TextStream, tracker: ChannelTracker) -> None:
        self._text = text
        self._tracker = tracker
        self._held = ""  # of a header, or of text that could begin one
        self._reasoning = ""  # ready, and not taken yet
        self._num_tokens = 0  # of the reasoning that were taken
        self._recipient = ""
        self._recipients: list[tuple[int, str]] = []  # not taken yet
        self._has_reasoned = self._has_spoken = False
        self._follows = False  # the next text is a message's first
        self._shows_newest: bool | None = True  # the newest token belongs to the answer; None: it is not known yet
        self._held_logprobs: list[tuple[TokenLogprob, int]] = []

    @property
    def num_decoded(self) -> int:
        """Characters of the answer so far, held back or not."""
        return self._text.num_decoded + (len(self._held) if self._tracker.place.after is None else 0)

    @property
    def stop_met(self) -> str | None:
        """As of `TextStream`."""
        return self._text.stop_met

    def push(self, token_id: int, may_stop: bool = True) -> tuple[str, bool]:
        """As `TextStream.push`, of the answer's text; what the token adds beside it is for `take`."""
        before = self._tracker.place
        read = self._tracker.push(token_id)
        if read is Read.MARK or read is Read.BEGIN:
            return self._end_text(before, begins=read is Read.BEGIN, may_stop=may_stop)
        decoded = self._text.decode(token_id)
        if read is Read.HEADER:
            self._held += decoded
            self._shows_newest = None
            if self._tracker.place.stage is Stage.HEADER and self._tracker.num_pending == 0:  # it is the role
                self._drop_held()
            return "", False
        if read is Read.BARE:
            decoded = end_of(self._held + decoded, self._tracker.bare(before, token_id))
            self._begin_message()
        return self._add(self._tracker.place.kind, decoded, may_stop)

    def _end_text(self, before: ChannelPlace, *, begins: bool, may_stop: bool) -> tuple[str, bool]:
        """A mark in this place; what was decoded of an unfinished character was its text's end."""
        rest = self._text.end_character()
        ready = "", False
        if before.stage is Stage.TEXT and rest:
            ready = self._add(before.kind, rest, may_stop)
        if begins or self._tracker.place.stage is not Stage.TEXT:
            self._drop_held()
        if begins:
            self._begin_message()
        self._shows_newest = False
        return ready

    def _drop_held(self) -> None:
        self._held, self._held_logprobs, self._shows_newest = "", [], False

    def _begin_message(self) -> None:
        place = self._tracker.place
        self._held, self._follows = "", True
        if place.kind is not Kind.REASONING and (place.recipient or self._recipient):
            self._recipient = place.recipient
            self._recipients.append((self._text.num_decoded, place.recipient))

    def _add(self, kind: Kind, text: str, may_stop: bool) -> tuple[str, bool]:
        self._shows_newest = kind is not Kind.REASONING
        is_first = self._follows and bool(text)
        self._follows = self._follows and not text
        if kind is Kind.REASONING:
            self._reasoning += _BETWEEN_TEXTS + text if is_first and self._has_reasoned else text
            self._has_reasoned = self._has_reasoned or bool(text)
            return "", False
        if not self._recipient:
            text = _BETWEEN_TEXTS + text if is_first and self._has_spoken else text
            self._has_spoken = self._has_spoken or bool(text)
        return self._text.add(text, may_stop)

    def flush(self) -> str:
        """As `TextStream.flush`."""
        place = self._tracker.place
        self._shows_newest = bool(self._shows_newest)
        if place.stage is Stage.TEXT and place.kind is not Kind.REASONING:
            return self._text.flush()
        rest = self._text.end_character()
        ready = self._add(place.kind, rest, may_stop=False)[0] if place.stage is Stage.TEXT and rest else ""
        return ready + self._text.flush()

    def take(self) -> Apart:
        """What has become certain beside the answer's text since the last call."""
        reasoning, self._reasoning = self._reasoning, ""
        recipients, self._recipients = tuple(self._recipients), []
        num_tokens = self._tracker.num_tokens
        before, self._num_tokens = self._num_tokens, num_tokens
        return Apart(reasoning, num_tokens - before, recipients)

    def take_logprobs(self, newest: TokenLogprob, offset: int) -> list[tuple[TokenLogprob, int]]:
        """Log-probabilities of the answer's tokens, with their offsets, up to the newest token; not those of others."""
        if self._shows_newest is None:
            self._held_logprobs.append((newest, offset))
            return []
        shown, self._held_logprobs = self._held_logprobs, []
        return [*shown, (newest, offset)] if self._shows_newest else []
