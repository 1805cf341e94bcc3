"""Drafts along a grammar: what it forces costs nothing, and guesses between are bounded in their losses."""

import random
from array import array
from collections.abc import Iterable

import numpy as np
import pytest

from stellarbyte_server.engine.drafts.along import MOST_ALONG
from stellarbyte_server.engine.drafts.drafter import Drafter

END = 10**6


class Template:
    """A grammar that forces the tokens of a text at some places, and allows all tokens at the others."""

    def __init__(self, text: list[int], num_prompt: int, forced_places: set[int], *, is_slow: bool = False) -> None:
        self.num_words = 0
        self.expected_s = 0.0
        self.is_ready, self.is_slow, self.is_complete, self.error = True, is_slow, False, None
        self.place = num_prompt
        self.known_place = num_prompt  # of the answer so far
        self.masks: set[int] = set()  # places of masks beyond the next choice's
        self._text, self._forced_places = text, forced_places

    def forced(self) -> tuple[int, ...]:
        end = self.place
        while end in self._forced_places and end < len(self._text):
            end += 1
        if self.place > self.known_place:
            self.masks.add(end)
        return tuple(self._text[self.place : end])

    def mask(self, out: np.ndarray) -> None:
        raise AssertionError(f"drafts need no mask, nor {out}")

    def num_allowed(self, token_ids: Iterable[int]) -> int:
        return len(tuple(token_ids))

    def accept(self, token_id: int) -> None:
        assert self.place not in self._forced_places or token_id == self._text[self.place]
        self.place += 1

    def begin_mask(self) -> None:
        raise AssertionError("drafts begin no mask")

    def rewind(self, num_tokens: int) -> None:
        self.place -= num_tokens


def play(
    text: list[int],
    forced_places: set[int],
    *,
    token_cost: float = 0.1,
    mask_cost: float = 0.0,
    num_prompt: int = 20,
    is_slow: bool = False,
) -> tuple[float, int]:
    """(steps that the answer takes, guesses and what is in vain after them included; steps)"""
    drafter, grammar = Drafter(num_prompt, ()), Template(text, num_prompt, forced_places, is_slow=is_slow)
    tokens, cost, num_steps = array("I", text[:num_prompt]), 0.0, 0
    while len(tokens) < len(text):
        draft = drafter.propose_along(tokens, grammar, {END}, token_cost, mask_cost)
        assert grammar.place == len(tokens) and len(draft) <= MOST_ALONG
        coming = text[len(tokens) :]
        right = next((i for i, pair in enumerate(zip(draft, coming, strict=False)) if pair[0] != pair[1]), len(draft))
        right = min(right, len(coming) - 1)
        guesses = {i for i in range(len(draft)) if len(tokens) + i not in forced_places}
        cost += 1 + token_cost * len(guesses | set(range(right, len(draft)))) + mask_cost * len(grammar.masks)
        num_steps += 1
        drafter.note(len(draft), right)
        for token in coming[: right + 1]:
            tokens.append(token)
            grammar.accept(token)
        grammar.known_place = grammar.place
        grammar.masks.clear()
    return cost, num_steps


def objects(count: int, values: list[list[int]]) -> tuple[list[int], set[int]]:
    """A prompt of 20 tokens, and objects with four keys of three tokens, each before a value of one token."""
    text, forced_places = list(range(5000, 5020)), set[int]()
    for number in range(count):
        for key in range(4):
            forced_places |= set(range(len(text), len(text) + 3))
            text += [100 + key, 200 + key, 300 + key, values[number][key]]
    return text, forced_places


def test_forced_tokens_take_no_step_and_other_ones_are_guessed_between_them() -> None:
    chance = random.Random(0)
    other = [[1000 + chance.randrange(10**5) for _ in range(4)] for _ in range(40)]
    _, num_steps = play(*objects(40, other))
    assert num_steps == 160, "a step for each value"
    _, num_steps = play(*objects(40, [[1, 2, 3, 4]] * 40))
    assert num_steps < 40, "several values in a step"
    _, num_steps = play(*objects(40, [[1, 2, 3, 4]] * 40), is_slow=True)
    assert num_steps == 160, "another thread computes their masks one by one"


@pytest.mark.parametrize("token_cost", [0.02, 0.2, 0.7])
@pytest.mark.parametrize("mask_cost", [0.0, 0.05, 0.5, 3.0])
@pytest.mark.parametrize("has_keys", [False, True])
def test_guesses_lose_at_most_the_first_credit_and_a_fiftieth(
    token_cost: float, mask_cost: float, has_keys: bool
) -> None:
    """If values are now and then those of the object before, or never."""
    for size in (2, 20, 10**5):
        chance = random.Random(size)
        values = [[1000 + chance.randrange(size) for _ in range(4)] for _ in range(50)]
        text, forced_places = objects(50, values)
        if not has_keys:
            forced_places = set()
        cost, _ = play(text, forced_places, token_cost=token_cost, mask_cost=mask_cost)
        num_choices = len(text) - 20 - len(forced_places)
        assert cost <= num_choices + 0.02 * (len(text) - 20) + 0.5


def test_a_mask_that_costs_more_than_it_gains_is_not_asked_for() -> None:
    text, forced_places = objects(40, [[1, 2, 3, 4]] * 40)
    cheap, _ = play(text, forced_places, mask_cost=0.1)
    _, num_steps = play(text, forced_places, mask_cost=3.0)
    assert cheap < 80 and num_steps > 150


def test_a_draft_ends_before_a_token_that_ends_the_answer() -> None:
    text = [1, 2, 3, 4, 5, 6, END, 7]
    drafter = Drafter(2, ())
    draft = drafter.propose_along(array("I", text[:2]), Template(text, 2, set(range(2, 8))), {END}, 0.1, 0.0)
    assert draft == (3, 4, 5, 6)
