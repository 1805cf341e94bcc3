"""A draft along a grammar: tokens that it forces, guesses where it leaves a choice, and so on."""

from collections.abc import Container
from itertools import takewhile
from typing import NamedTuple

from stellarbyte_server.engine.state.sequence import TokenMask

MOST_ALONG = 32  # tokens of a draft along a grammar
FORCED = -1  # the source of tokens that a grammar forces


class Drafted(NamedTuple):
    """What a token of a draft comes from, and what it costs; None: it is certain."""

    source: int
    cost: float | None


class DraftAlong:
    """Grows by guesses. It leads the grammar on; `leave` returns it to where it was.

    A step samples the token at the choice after its draft. So a right guess saves a step if the draft also has all
    tokens that the grammar forces after it; without the guess, these would be certain in the next step.
    """

    def __init__(
        self, grammar: TokenMask, end_token_ids: Container[int], *, token_cost: float, mask_cost: float, credit: float
    ) -> None:
        """Costs of one more token and one more mask, and what may be spent on them, in steps."""
        self.tokens: list[int] = []
        self.drafted: list[Drafted] = []
        self.chance = 1.0  # that all of its guesses are right
        self.wasted = 0.0  # cost of masks after guesses that were not added
        self._grammar = grammar
        self._end_token_ids = end_token_ids
        self._token_cost, self._mask_cost = token_cost, mask_cost
        self._left = credit
        self._num_accepted = 0
        forced = self._forced()
        self._add(forced[:MOST_ALONG], FORCED, None)
        # While another thread computes the masks, that after the forced tokens is the last one known.
        self.may_guess = len(forced) < MOST_ALONG and not self._is_over(forced) and not grammar.is_slow

    def _forced(self) -> list[int]:
        return list(takewhile(lambda token: token not in self._end_token_ids, self._grammar.forced()))

    def _is_over(self, forced: list[int]) -> bool:
        """Whether a token that ends the answer follows."""
        return len(forced) < len(self._grammar.forced())

    def is_worth(self, chance: float, num_forced: int = 0) -> bool:
        """Whether a guess that is right with this chance, if those before it are, is likely to pay off, with so many
        tokens that are forced after it."""
        chance *= self.chance
        return chance >= self._token_cost + (1 - chance) * (num_forced * self._token_cost + self._mask_cost)

    def add(self, token: int, source: int, chance: float, *, may_try: bool = False) -> None:
        """Add a guess at a choice, and what is forced after it, if the grammar allows it and it is worth that.

        `may_try`: add it, as the last one, even if it is not worth that, but can be paid.
        """
        self.may_guess = False
        if token in self._end_token_ids or self._token_cost + self._mask_cost > self._left:
            return
        for earlier in self.tokens[self._num_accepted :]:
            self._grammar.accept(earlier)
        self._num_accepted = len(self.tokens)
        if not self._grammar.num_allowed((token,)):
            return
        self._grammar.accept(token)
        self._num_accepted += 1
        if self._grammar.is_complete or self._grammar.error is not None:
            return  # there is nothing to sample after it
        forced = self._forced()
        is_short = len(self.tokens) + 1 + len(forced) <= MOST_ALONG
        is_affordable = (1 + len(forced)) * self._token_cost + self._mask_cost <= self._left
        is_worth = self.is_worth(chance, len(forced))
        if not (is_short and is_affordable and (is_worth or may_try)):
            self.wasted += self._mask_cost
            return
        self.chance *= chance
        self._add([token], source, self._token_cost + self._mask_cost)
        self._add(forced, FORCED, self._token_cost)
        self.may_guess = is_worth and not self._is_over(forced) and not self._grammar.is_slow

    def _add(self, tokens: list[int], source: int, cost: float | None) -> None:
        self.tokens += tokens
        self.drafted += [Drafted(source, cost)] * len(tokens)
        self._left -= (cost or 0.0) * len(tokens)

    def leave(self) -> None:
        """Return the grammar to where it was."""
        if self._num_accepted:
            self._grammar.rewind(self._num_accepted)
