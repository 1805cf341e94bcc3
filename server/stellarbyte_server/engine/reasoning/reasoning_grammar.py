"""A grammar with reasoning before it: the reasoning is free, and ends when its tokens are spent."""

from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np
from tokenizers import Tokenizer

from stellarbyte_server.engine.grammar.followed import Grammar
from stellarbyte_server.engine.reasoning.channel_tracker import ChannelTracker
from stellarbyte_server.engine.reasoning.tracker import ReasoningTracker
from stellarbyte_server.engine.reasoning.words import Words, allow, allow_all, allow_only, forbid
from stellarbyte_server.protocol.request import Channels, Reasoning
from stellarbyte_server.tokens.token_bytes import TokenBytes, token_bytes_of

MAX_REWIND = 1024  # tokens at once


class Tracker(Protocol):
    """Where an answer stands: in what is free of its grammar (`is_reasoning`), in the answer, or before either."""

    place: Any  # all that it remembers; immutable

    @property
    def is_reasoning(self) -> bool: ...
    @property
    def is_answering(self) -> bool: ...

    @property
    def num_tokens(self) -> int:
        """Tokens of the reasoning, without its marks."""

    @property
    def num_pending(self) -> int:
        """Before reasoning or answer: the newest tokens, which may be the answer's."""

    def opening(self, *, is_spent: bool) -> tuple[int, ...]:
        """Before reasoning or answer: the tokens that go on with a start mark. `is_spent`: the limit is reached."""

    def reserved(self) -> tuple[int, ...]:
        """Outside the reasoning: tokens that would begin another one when its tokens are spent."""

    def forced(self, *, is_spent: bool, has_grammar: bool) -> int | None:
        """In the reasoning: the only token that may come; None: there are several."""

    def barred(self, vocab_size: int) -> frozenset[int]:
        """In the reasoning: tokens that may not come before a grammar."""

    def push(self, token_id: int) -> object:
        """Take the next token."""


def _tracker(reasoning: Reasoning | Channels, token_bytes: TokenBytes) -> Tracker:
    if isinstance(reasoning, Channels):
        return ChannelTracker(reasoning, token_bytes)
    return ReasoningTracker(reasoning, token_bytes)


class _Accepted(NamedTuple):
    """A token, and the state before it."""

    token_id: int
    place: Any
    num_followed: int


class ReasoningGrammar:
    """A `Grammar` of reasoning and answer. Engine thread only.

    `grammar` holds for the answer; None: it is free. While there is a grammar, no token of `end_token_ids` may end the
    answer within its reasoning. With channels, the answer begins with the header of its message.
    """

    def __init__(
        self,
        reasoning: Reasoning | Channels,
        tokenizer: Tokenizer,
        vocab_size: int,
        grammar: Grammar | None,
        end_token_ids: Iterable[int],
    ) -> None:
        self._limit = reasoning.max_tokens
        self._vocab_size = vocab_size
        self._grammar = grammar
        self._stops = [token_id for token_id in end_token_ids if token_id < vocab_size]
        self._tracker: Tracker = _tracker(reasoning, token_bytes_of(tokenizer))
        self._num_followed = 0  # tokens of the answer that the grammar has accepted
        self._accepted: deque[_Accepted] = deque(maxlen=MAX_REWIND)
        self.num_words = (vocab_size + 31) // 32
        if grammar is not None and isinstance(reasoning, Channels):
            self._follow(grammar, reasoning.begun[len(reasoning.begun) - self._tracker.num_pending :])

    def _follow(self, grammar: Grammar, token_ids: Iterable[int]) -> None:
        """Take the tokens of a header that the prompt has begun, as far as they may be the answer's."""
        for token_id in token_ids:
            if not self._allows(grammar, token_id):
                break
            grammar.accept(token_id)
            self._num_followed += 1

    def mask(self, out: Words) -> None:
        """As of `TokenMask`."""
        tracker = self._tracker
        if tracker.is_reasoning:
            self._mask_reasoning(out)
        elif self._grammar is None:
            allow_all(out, self._vocab_size)
            if self._is_spent:
                forbid(out, tracker.reserved())
        elif tracker.is_answering:
            self._grammar.mask(out)
        else:
            self._mask_beginning(out, self._grammar)

    @property
    def _is_spent(self) -> bool:
        return self._limit is not None and self._tracker.num_tokens >= self._limit

    def _mask_reasoning(self, out: Words) -> None:
        tracker, has_grammar = self._tracker, self._grammar is not None
        if (only := tracker.forced(is_spent=self._is_spent, has_grammar=has_grammar)) is not None:
            allow_only(out, (only,))
            return
        allow_all(out, self._vocab_size)
        if has_grammar:
            forbid(out, self._stops)
            forbid(out, tracker.barred(self._vocab_size))

    def _mask_beginning(self, out: Words, grammar: Grammar) -> None:
        """Reasoning may still come, or the answer."""
        if self._num_followed == self._tracker.num_pending:
            grammar.mask(out)
        else:
            out[:] = 0  # in a start mark, with which no answer could begin
        allow(out, self._tracker.opening(is_spent=self._is_spent))

    @property
    def expected_s(self) -> float:
        return 0.0 if self._grammar is None or self._tracker.is_reasoning else self._grammar.expected_s

    def forced(self) -> tuple[int, ...]:
        """As of `TokenMask`; of the reasoning's end, and of the answer."""
        tracker = self._tracker
        if tracker.is_reasoning:
            only = tracker.forced(is_spent=self._is_spent, has_grammar=self._grammar is not None)
            return () if only is None else (only,)
        return self._grammar.forced() if self._grammar is not None and tracker.is_answering else ()

    def num_allowed(self, token_ids: Iterable[int]) -> int:
        """As of `TokenMask`; exact within the answer only: elsewhere the masks decide."""
        if self._grammar is not None and self._tracker.is_answering:
            return self._grammar.num_allowed(token_ids)
        return len(tuple(token_ids))

    def accept(self, token_id: int) -> None:
        """As of `Grammar`."""
        tracker, grammar = self._tracker, self._grammar
        self._accepted.append(_Accepted(token_id, tracker.place, self._num_followed))
        if grammar is None or tracker.is_reasoning:
            tracker.push(token_id)
            return
        if tracker.is_answering:  # all that comes is the grammar's, marks included
            grammar.accept(token_id)
            self._num_followed += 1
            return
        may_begin = self._may_begin(grammar, token_id)
        tracker.push(token_id)
        if tracker.is_reasoning:  # it was a start mark
            if self._num_followed:
                grammar.rewind(self._num_followed)
            self._num_followed = 0
        elif may_begin or tracker.is_answering:  # a token that it does not allow is its error
            grammar.accept(token_id)
            self._num_followed += 1

    def _may_begin(self, grammar: Grammar, token_id: int) -> bool:
        """Whether an answer can begin with the tokens so far, and this one."""
        return self._num_followed == self._tracker.num_pending and self._allows(grammar, token_id)

    def _allows(self, grammar: Grammar, token_id: int) -> bool:
        words_W = np.zeros(self.num_words, np.uint32)
        grammar.mask(words_W)
        return bool(words_W[token_id // 32] >> np.uint32(token_id % 32) & np.uint32(1))

    def rewind(self, num_tokens: int) -> None:
        """As of `TokenMask`; at most `MAX_REWIND` tokens."""
        num_kept = self._num_followed  # tokens that the grammar has followed all the while
        for _ in range(num_tokens):
            _, place, num_followed = self._accepted.pop()
            num_kept = min(num_kept, num_followed)
        if self._grammar is not None and self._num_followed > num_kept:
            self._grammar.rewind(self._num_followed - num_kept)
        self._tracker.place, self._num_followed = place, num_followed
        if self._grammar is not None and num_kept < num_followed:  # back before a start mark
            start = len(self._accepted) - max(num_followed, self._tracker.num_pending)
            for earlier in list(self._accepted)[start + num_kept : start + num_followed]:
                self._grammar.accept(earlier.token_id)

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
