"""Costs and chances are what the steps and drafts so far show."""

import random

import pytest

from stellarbyte_server.engine.drafts.worth import Acceptance, StepCosts


@pytest.mark.parametrize(("start", "slope"), [(0.03, 0.0015), (0.005, 0.002), (0.0, 0.002)])
def test_a_token_costs_what_steps_show(start: float, slope: float) -> None:
    chance = random.Random(0)
    costs = StepCosts()
    for number in range(200):
        num_tokens = chance.choice([1, 1, 2, 5, 13])
        seconds = (start + slope * num_tokens) * chance.uniform(0.95, 1.05)
        costs.note(num_tokens, seconds * (50 if number % 40 == 39 else 1))  # now and then another program runs
    assert costs.token_cost(1) == pytest.approx(slope / (start + slope), rel=0.35)
    assert costs.token_cost(1) < costs.token_cost(8) < costs.token_cost(64) <= 1


def test_before_any_step_and_without_a_clock_it_is_a_guess() -> None:
    costs = StepCosts()
    assert costs.token_cost(1) == pytest.approx(0.2)
    costs.note(1, 0.0)
    assert costs.token_cost(1) == pytest.approx(0.2)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_best_length_gains_most(share: float) -> None:
    acceptance, chance = Acceptance(0.5), random.Random(1)
    for _ in range(300):
        acceptance.note(1, int(chance.random() < share))
    for cost in (0.05, 0.2, 0.5, 0.8):
        length = acceptance.best_length(cost)
        gains = [sum(acceptance.chance**i for i in range(1, n + 1)) - cost * n for n in range(60)]
        assert gains[length] == pytest.approx(max(gains), abs=1e-9)


def test_tokens_after_the_first_wrong_one_do_not_count() -> None:
    one, other = Acceptance(0.5), Acceptance(0.5)
    one.note(2, 1)
    other.note(12, 1)
    assert one.chance == other.chance
