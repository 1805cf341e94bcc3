"""A grammar with reasoning before it: the reasoning is free, and ends when its tokens are spent."""

import functools
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from stellarbyte_server.engine.grammar.followed import Grammar
from stellarbyte_server.engine.reasoning.tracker import Place, ReasoningTracker
from stellarbyte_server.protocol.request import Reasoning
from stellarbyte_server.tokens.token_bytes import token_bytes_of

MAX_REWIND = 1024  # tokens at once

Words = NDArray[np.uint32]


class _Accepted(NamedTuple):
    """A token, and the state before it."""

    token_id: int
    place: Place
    num_followed: int


class ReasoningGrammar:
    """A `Grammar` of reasoning and answer. Engine thread only.

    `grammar` holds for the answer; None: it is free. While there is a grammar, no token of `end_token_ids` may end the
    answer within its reasoning.
    """

    def __init__(
        self,
        reasoning: Reasoning,
        tokenizer: Tokenizer,
        vocab_size: int,
        grammar: Grammar | None,
        end_token_ids: Iterable[int],
    ) -> None:
        self._limit = reasoning.max_tokens
        self._end = None if reasoning.end_id is not None else reasoning.end
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._grammar = grammar
        self._stops = [token_id for token_id in end_token_ids if token_id < vocab_size]
        self._tracker = ReasoningTracker(reasoning, token_bytes_of(tokenizer))
        self._next_of_start = _next_of(reasoning.start_token_ids, tokenizer)
        self._next_of_end = _next_of(reasoning.end_token_ids, tokenizer)
        self._num_followed = 0  # tokens of the answer that the grammar has accepted
        self._accepted: deque[_Accepted] = deque(maxlen=MAX_REWIND)
        self.num_words = (vocab_size + 31) // 32

    def mask(self, out: Words) -> None:
        """As of `TokenMask`."""
        tracker = self._tracker
        if tracker.is_reasoning:
            self._mask_reasoning(out)
        elif self._grammar is None:
            _allow_all(out, self._vocab_size)
        elif tracker.is_answering:
            self._grammar.mask(out)
        else:
            self._mask_beginning(out, self._grammar)

    def _mask_reasoning(self, out: Words) -> None:
        num_matched = self._tracker.place.num_matched
        if self._limit is not None and self._tracker.num_tokens >= self._limit:
            out[:] = 0
            _set(out, self._next_of_end.get(num_matched, self._next_of_end[0]), True)
            return
        _allow_all(out, self._vocab_size)
        if self._grammar is None:
            return
        for token_id in self._stops:
            _set(out, token_id, False)
        if self._end is not None:  # what comes after the mark in the same token, the grammar would not see
            out &= ~_going_past(self._tokenizer, self._end, num_matched, len(out))

    def _mask_beginning(self, out: Words, grammar: Grammar) -> None:
        """Reasoning may still come, or the answer."""
        place = self._tracker.place
        if self._num_followed == place.num_pending:
            grammar.mask(out)
        else:
            out[:] = 0  # in a start mark, with which no answer could begin
        if (following := self._next_of_start.get(place.num_matched)) is not None:
            _set(out, following, True)

    def accept(self, token_id: int) -> None:
        """As of `Grammar`."""
        tracker = self._tracker
        self._accepted.append(_Accepted(token_id, tracker.place, self._num_followed))
        if tracker.is_reasoning or self._grammar is None:
            tracker.push(token_id)
            return
        may_begin = tracker.is_answering or self._may_begin(token_id)
        tracker.push(token_id)
        if tracker.is_reasoning:  # it was a start mark
            if self._num_followed:
                self._grammar.rewind(self._num_followed)
            self._num_followed = 0
        elif may_begin or tracker.is_answering:  # a token that it does not allow is its error
            self._grammar.accept(token_id)
            self._num_followed += 1

    def _may_begin(self, token_id: int) -> bool:
        """Whether an answer can begin with the tokens so far, and this one."""
        if self._grammar is None or self._num_followed < self._tracker.place.num_pending:
            return False
        words_W = np.zeros(self.num_words, np.uint32)
        self._grammar.mask(words_W)
        return bool(words_W[token_id // 32] >> np.uint32(token_id % 32) & np.uint32(1))

    def rewind(self, num_tokens: int) -> None:
        """As of `TokenMask`; at most `MAX_REWIND` tokens."""
        taken = [self._accepted.pop() for _ in range(num_tokens)]
        place, num_followed = taken[-1].place, taken[-1].num_followed
        if self._grammar is not None:
            if self._num_followed > num_followed:
                self._grammar.rewind(self._num_followed - num_followed)
            for earlier in list(self._accepted)[len(self._accepted) - num_followed + self._num_followed :]:
                self._grammar.accept(earlier.token_id)  # back before a start mark
        self._tracker.place, self._num_followed = place, num_followed

    def begin_mask(self) -> None:
        """As of `Grammar`."""
        if self._grammar is not None and self._num_followed and not self._tracker.is_reasoning:
            self._grammar.begin_mask()

    @property
    def is_ready(self) -> bool:
        return self._grammar is None or self._grammar.is_ready

    @property
    def is_slow(self) -> bool:
        return self._grammar is not None and not self._tracker.is_reasoning and self._grammar.is_slow

    @property
    def is_complete(self) -> bool:
        return self._grammar is not None and self._tracker.is_answering and self._grammar.is_complete

    @property
    def error(self) -> str | None:
        return None if self._grammar is None else self._grammar.error


def _next_of(token_ids: tuple[int, ...], tokenizer: Tokenizer) -> dict[int, int]:
    """The token that goes on with a mark, by how many of its bytes are written; 0: the first."""
    following: dict[int, int] = {}
    written = b""
    for token_id in token_ids:
        following[len(written.lstrip())] = token_id
        written += token_bytes_of(tokenizer)[token_id]
    return following


def _allow_all(out: Words, vocab_size: int) -> None:
    out[:] = np.uint32(0xFFFFFFFF)
    if vocab_size % 32:
        out[-1] = np.uint32((1 << vocab_size % 32) - 1)


def _set(out: Words, token_id: int, may_follow: bool) -> None:
    bit = np.uint32(1 << token_id % 32)
    out[token_id // 32] = out[token_id // 32] | bit if may_follow else out[token_id // 32] & ~bit


@functools.lru_cache(maxsize=64)
def _going_past(tokenizer: Tokenizer, mark: str, num_matched: int, num_words: int) -> Words:
    """The tokens with text after the mark that they complete, where so many of its bytes were matched."""
    whole, rest = mark.encode(), mark.encode()[num_matched:]
    words = np.zeros(num_words, np.uint32)
    for token_id, data in token_bytes_of(tokenizer).with_special().items():
        goes_past = (data.startswith(rest) and len(data) > len(rest)) or whole in data[:-1]
        if goes_past and token_id < num_words * 32:
            _set(words, token_id, True)
    return words
