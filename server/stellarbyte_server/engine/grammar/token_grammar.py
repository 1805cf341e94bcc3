"""One answer's state in its grammar, advanced token by token."""

import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from stellarbyte_server.engine.grammar.choices import Choice, next_choice
from stellarbyte_server.engine.grammar.mask_workers import QUICK_MASK_S, MaskWorkers
from stellarbyte_server.engine.grammar.vocabulary import GrammarVocabulary
from stellarbyte_server.protocol.grammar import grammar_end

_KEEPS = 0.98  # share of a mask's time that the next one is expected to take at least, for each token between them

_MOST_KNOWN = 40  # choices; a draft has fewer


@dataclass(frozen=True, kw_only=True)
class CompiledGrammar:
    """A grammar before its first token."""

    matcher: LLMatcher
    first: Choice
    first_s: float  # what it took


class TokenGrammar:
    """One request's state in its grammar. Engine thread only; slow masks are computed by another thread.

    A mask is computed for each place where the grammar leaves a choice. It is found together with the tokens that the
    grammar forces before that place, so these need none. What was found stays known after a rewind.
    """

    def __init__(self, compiled: CompiledGrammar, vocabulary: GrammarVocabulary, workers: MaskWorkers) -> None:
        self._matcher = compiled.matcher
        self._first = compiled.matcher.deep_copy()  # to begin again with, after an error
        self._workers = workers
        self._vocabulary = vocabulary
        self.num_words = (vocabulary.vocab_size + 31) // 32
        self._accepted: list[int] = []
        self._choices = [compiled.first]  # the known ones, of one path through the accepted tokens, and after them
        self.expected_s = compiled.first_s  # to compute a mask
        self._pending: Future[None] | None = None
        self.is_slow = self.expected_s > QUICK_MASK_S  # another thread computes its masks

    def mask(self, out: NDArray[np.uint32]) -> None:
        """Write the allowed next tokens: bit i % 32 of word i // 32 is token i; bits beyond the vocabulary are 0.

        `out` has `num_words` contiguous words. Check `error` afterwards: with an error the mask is invalid.
        """
        assert out.dtype == np.uint32 and out.shape == (self.num_words,) and out.flags.c_contiguous
        choice, place = self._choice(), len(self._accepted)
        if place < choice.end:
            token_id = choice.forced[place - choice.start]
            out[:] = 0
            out[token_id // 32] = 1 << token_id % 32
            return
        if choice.words_W is None:  # an error
            out[:] = 0
            return
        # A tokenizer may have more tokens than the model has logits, and the library's masks may exceed both.
        out[:] = choice.words_W[: len(out)]
        if self._vocabulary.vocab_size % 32:
            out[-1] &= np.uint32((1 << self._vocabulary.vocab_size % 32) - 1)

    def forced(self) -> tuple[int, ...]:
        """The next tokens, as far as the grammar leaves no choice; () if it does."""
        choice = self._choice()
        return choice.forced[len(self._accepted) - choice.start :]

    def num_allowed(self, token_ids: Iterable[int]) -> int:
        """How many of these tokens, from the first on, the grammar allows."""
        self._settle()
        return int(self._matcher.validate_tokens(list(token_ids)))

    def accept(self, token_id: int) -> None:
        """Advance by the chosen token; sets `error` if the mask did not allow it."""
        self._settle()
        self._matcher.consume_token(token_id)
        self._accepted.append(token_id)
        place = len(self._accepted)
        for choice in self._choices:
            is_forced = choice.start < place <= choice.end and choice.forced[place - 1 - choice.start] == token_id
            if is_forced or (choice.start == place and choice.after == token_id):
                return  # on the known path
        self._choices = [choice for choice in self._choices if choice.end < place]

    def rewind(self, num_tokens: int) -> None:
        """Undo the last `num_tokens` accepted tokens, and an error of theirs."""
        self._settle()
        del self._accepted[len(self._accepted) - num_tokens :]
        if self._matcher.is_error():
            self._begin_again()
        else:
            self._matcher.rollback(num_tokens)

    def begin_mask(self) -> None:
        """Start computing the next mask on another thread, if it is not known and expected to take long."""
        self._settle()
        place = len(self._accepted)
        self._choices = [choice for choice in self._choices if choice.end >= place]
        if self._known() is not None:
            self.is_slow = self._workers.is_slow(self.expected_s)  # a step ahead may need the one after it
            return
        self.is_slow = not self._workers.may_leave(self.expected_s)
        if self.is_slow:
            self._pending = self._workers.submit(self._compute)

    @property
    def is_ready(self) -> bool:
        """Whether no other thread is computing its mask."""
        return self._pending is None or self._pending.done()

    @property
    def is_complete(self) -> bool:
        """Whether only end-of-sequence can follow."""
        self._settle()
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str | None:
        """Why masks cannot be computed any more, in one sentence. Permanent, but for a rewind."""
        self._settle()
        if not self._matcher.is_error():
            return None
        return grammar_end(self._matcher.get_error())

    def _settle(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _choice(self) -> Choice:
        """That of the next place."""
        self._settle()
        if (known := self._known()) is not None:
            return known
        self._compute()
        return self._choices[-1]

    def _known(self) -> Choice | None:
        place = len(self._accepted)
        return next((choice for choice in self._choices if choice.covers(place)), None)

    def _compute(self) -> None:
        started_s = time.thread_time()
        place, after = len(self._accepted), self._accepted[-1] if self._accepted else None
        choice = next_choice(self._matcher, self._vocabulary, start=place, after=after)
        # Slow masks occur among quick ones: after a slow one, the grammar counts as slow for the next hundred tokens.
        keeps = _KEEPS ** (1 + len(choice.forced))
        self.expected_s = max(time.thread_time() - started_s, keeps * self.expected_s)
        if choice.forced and self._matcher.is_error():  # the forced tokens can still be had
            self._begin_again()
        self._choices = [known for known in self._choices[-_MOST_KNOWN:] if known.start < place]
        self._choices.append(choice)

    def _begin_again(self) -> None:
        """Replace the matcher, which has an error, by one that has accepted the same tokens."""
        self._matcher = self._first.deep_copy()
        self._matcher.consume_tokens(self._accepted)
