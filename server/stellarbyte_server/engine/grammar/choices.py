"""The places of an answer where its grammar leaves a choice, and the tokens that it forces before them."""

from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from stellarbyte_server.engine.grammar.vocabulary import GrammarVocabulary


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a grammar allows from a place on, up to the next token that it leaves open.

    The number of a place is that of the tokens before it.
    """

    start: int
    after: int | None  # the token before `start`; None: there is none
    forced: tuple[int, ...]  # the only tokens that it allows at `start` and the places after it
    words_W: NDArray[np.uint32] | None
    """The mask after them, in the library's size. None: it is not known, since more tokens are forced than is known for
    sure, or the mask could not be computed."""

    @property
    def end(self) -> int:
        """The place of the choice."""
        return self.start + len(self.forced)

    def covers(self, place: int) -> bool:
        """Whether the mask at a place is known."""
        return self.start <= place and (place < self.end or (place == self.end and self.words_W is not None))


def next_choice(
    matcher: LLMatcher, vocabulary: GrammarVocabulary, *, start: int = 0, after: int | None = None
) -> Choice:
    """The choice that follows. The matcher is left as it was, unless it has an error then.

    A token is forced if the mask at its place has no other: the library forces tokens by masks of one token, those of
    the tokenizer's own division of the bytes that the grammar forces.
    """
    token_ids: list[int] = matcher.compute_ff_tokens()
    forced = token_ids[: vocabulary.num_sure(token_ids)]
    words_W = None
    if not forced or len(forced) == len(token_ids):
        for token_id in forced:
            matcher.consume_token(token_id)
        words_W = np.zeros(vocabulary.num_words, np.uint32)
        matcher.unsafe_compute_mask_ptr(words_W.ctypes.data, words_W.nbytes)
        if matcher.is_error():
            words_W = None
        elif forced:
            matcher.rollback(len(forced))
    return Choice(start=start, after=after, forced=tuple(forced), words_W=words_W)
