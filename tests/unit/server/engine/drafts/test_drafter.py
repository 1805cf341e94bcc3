"""A request drafts as long as it gains, and loses little if it does not."""

import random
from array import array

import pytest

from stellarbyte_server.engine.drafts.drafter import MOST_DRAFTED, Drafter


def play(
    text: list[int], cost: float, prediction: tuple[int, ...] = (), num_prompt: int = 20
) -> tuple[float, int, int]:
    """(steps that the answer takes, drafts' costs included; tokens drafted; tokens accepted)"""
    drafter = Drafter(num_prompt, prediction)
    tokens, steps, num_drafted, num_accepted = array("I", text[:num_prompt]), 0.0, 0, 0
    while len(tokens) < len(text):
        draft = drafter.propose(tokens, cost)
        coming = text[len(tokens) :]
        right = next((i for i, pair in enumerate(zip(draft, coming, strict=False)) if pair[0] != pair[1]), len(draft))
        right = min(right, len(coming) - 1)
        if draft:
            assert len(draft) <= MOST_DRAFTED
            drafter.note(len(draft), right)
        steps += 1 + cost * len(draft)
        num_drafted, num_accepted = num_drafted + len(draft), num_accepted + right
        tokens.extend(coming[: right + 1])
    return steps, num_drafted, num_accepted


@pytest.mark.parametrize("cost", [0.02, 0.1, 0.3, 0.7, 0.97])
@pytest.mark.parametrize("size", [2, 20, 1000])
def test_it_loses_at_most_its_first_credit_and_a_fiftieth(cost: float, size: int) -> None:
    """Whether guesses are now and then right, or never."""
    for seed in range(5):
        chance = random.Random(seed)
        text = [chance.randrange(size) for _ in range(420)]
        steps, _, _ = play(text, cost)
        assert steps <= 400 * 1.02 + 0.5


def test_even_if_what_is_repeated_always_goes_on_otherwise() -> None:
    text = [token for i in range(100) for token in (1, 2, 3, 4, 1000 + i)]
    steps, num_drafted, _ = play(text, 0.2)
    assert num_drafted > 0 and steps <= 480 * 1.02 + 0.5


@pytest.mark.parametrize("cost", [0.05, 0.2])
def test_repeated_text_takes_few_steps(cost: float) -> None:
    words = [random.Random(0).randrange(1000) for _ in range(150)]
    steps, _, _ = play(words * 2, cost, num_prompt=150)
    assert steps < 150 / 2
    steps, num_drafted, num_accepted = play([1] * 20 + words, cost, prediction=tuple(words))
    assert steps < 150 / 2 and num_accepted > 0.9 * num_drafted


def test_what_was_wrong_for_long_is_tried_again() -> None:
    chance = random.Random(0)
    words = [chance.randrange(1000) for _ in range(100)]
    wrong = [token for i in range(60) for token in (1, 2, 3, 4, 1000 + i)]
    steps, _, _ = play(wrong + words + words * 3, 0.1)
    alone, _, _ = play([0] * 20 + words * 3, 0.1)
    assert steps < len(wrong) * 1.02 + 100 + alone + 40
