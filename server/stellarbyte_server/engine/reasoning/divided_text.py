"""The text of an answer that may have reasoning, divided into the two as its tokens come."""

import codecs
from typing import NamedTuple

from stellarbyte_server.engine.reasoning.tracker import Passed, Phase, ReasoningTracker
from stellarbyte_server.engine.text import TextStream
from stellarbyte_server.protocol.messages import TokenLogprob

_NEWLINES = "\r\n"


class Apart(NamedTuple):
    """What has become certain beside the answer's text."""

    reasoning: str
    num_reasoning_tokens: int
    recipients: tuple[tuple[int, str], ...] = ()  # as of `Delta`


class DividedText:
    """A `TextStream` for the answer, and what comes before it. Engine thread only; one instance per request.

    Marks are in neither text, nor are the newlines beside them. Stop strings are looked for in the answer only.
    """

    def __init__(self, text: TextStream, tracker: ReasoningTracker) -> None:
        self._text = text
        self._tracker = tracker
        self._held = ""  # before the answer: text that may be white space beside a mark, or a part of one
        self._reasoning = ""  # ready, and not taken yet
        self._num_tokens = 0  # of the reasoning that were taken
        self._has_begun = False  # some of the reasoning was ready
        self._skips_newlines = False  # the reasoning has just ended
        self._shows_newest = True  # the newest token belongs to the answer
        self._is_over = False
        self._held_logprobs: list[tuple[TokenLogprob, int]] = []

    @property
    def num_decoded(self) -> int:
        """Characters of the answer so far, held back or not."""
        return self._text.num_decoded + (len(self._held) if self._tracker.place.phase is Phase.BEGIN else 0)

    @property
    def stop_met(self) -> str | None:
        """As of `TextStream`."""
        return self._text.stop_met

    def push(self, token_id: int, may_stop: bool = True) -> tuple[str, bool]:
        """As `TextStream.push`, of the answer's text; what the token adds to the reasoning is for `take`."""
        tracker = self._tracker
        if tracker.is_answering:
            return self._answer(self._text.decode(token_id), may_stop)
        passed = tracker.push(token_id)
        # A mark that is a token has no text; one of bytes is cut out of the text of its tokens.
        is_token = passed != Passed() and token_id in tracker.mark_ids
        self._held += self._text.end_character() if is_token else self._text.decode(token_id)
        if passed.start is not None:  # white space before it says nothing
            self._held, self._held_logprobs = end_of(self._held, passed.start), []
        if passed.end is not None:
            return self._end_reasoning(passed.end, 0 if is_token else tracker.num_end_bytes, may_stop)
        if tracker.is_answering:
            held, self._held = self._held, ""
            return self._answer(held, may_stop)
        self._shows_newest = not tracker.is_reasoning  # as long as it is not known it is held
        if tracker.place.phase is Phase.REASONING:
            self._reason()
        return "", False

    def _end_reasoning(self, rest: bytes, num_characters: int, may_stop: bool) -> tuple[str, bool]:
        """The end mark of so many characters is in the held text, with these bytes after it."""
        after = end_of(self._held, rest)
        self._held = self._held[: max(0, len(self._held) - len(after) - num_characters)]
        self._reason(is_over=True)
        self._skips_newlines, self._shows_newest = True, False
        return self._answer(after, may_stop) if after else ("", False)

    def flush(self) -> str:
        """As `TextStream.flush`."""
        self._is_over = True
        if self._tracker.is_answering:
            return self._text.flush()
        self._held += self._text.end_character()
        self._shows_newest = not self._tracker.is_reasoning
        if self._tracker.is_reasoning:
            self._tracker.finish()
            self._reason(is_over=True)
            return ""
        held, self._held = self._held, ""
        text, stopped = self._text.add(held)
        return text if stopped else text + self._text.flush()

    def take(self) -> Apart:
        """What has become certain of the reasoning since the last call."""
        reasoning, self._reasoning = self._reasoning, ""
        num_tokens = self._tracker.place.num_tokens
        before, self._num_tokens = self._num_tokens, num_tokens
        return Apart(reasoning, num_tokens - before)

    def take_logprobs(self, newest: TokenLogprob, offset: int) -> list[tuple[TokenLogprob, int]]:
        """Log-probabilities of the answer's tokens, with their offsets, up to the newest token; not those of others."""
        if self._shows_newest and not self._is_over and not self._tracker.is_answering:  # it is not known yet
            self._held_logprobs.append((newest, offset))
            return []
        shown, self._held_logprobs = self._held_logprobs, []
        return [*shown, (newest, offset)] if self._shows_newest else shown

    def _reason(self, *, is_over: bool = False) -> None:
        """Let as much of the held text be reasoning as can be neither a mark nor the newlines before one."""
        if not self._has_begun:
            self._held = self._held.lstrip(_NEWLINES)
        num_matched = 0 if is_over else min(self._tracker.place.num_matched, len(self._held))
        ready = self._held[: len(self._held) - num_matched].rstrip(_NEWLINES)
        self._reasoning += ready
        self._held = "" if is_over else self._held[len(ready) :]
        self._has_begun = self._has_begun or bool(ready)

    def _answer(self, text: str, may_stop: bool) -> tuple[str, bool]:
        self._shows_newest = True
        if self._skips_newlines and text:
            text = text.lstrip(_NEWLINES)
            self._skips_newlines = not text
            self._shows_newest = bool(text)
        return self._text.add(text, may_stop)


def end_of(text: str, data: bytes) -> str:
    """The end of the text that these bytes are; all of it if they are more."""
    num_characters = len(codecs.getincrementaldecoder("utf-8")("replace").decode(data))
    return text[max(0, len(text) - num_characters) :]
