"""Histograms: where values are counted, and what several of them add up to."""

import random

import pytest

from stellarbyte_server.protocol.histogram import (
    BETWEEN_TOKENS_S,
    FIRST_TOKEN_S,
    LAG_S,
    QUEUE_S,
    REQUEST_S,
    REQUEST_TOKENS,
    STEP_S,
    STEP_TOKENS,
    Histogram,
)


def test_a_value_is_counted_by_the_smallest_bound_that_it_does_not_exceed() -> None:
    histogram = Histogram((1.0, 2.0, 4.0))
    for value in (0.0, 1.0, 1.5, 2.0, 4.0, 4.1, 100.0):
        histogram.observe(value)
    buckets = histogram.snapshot()
    assert buckets.counts == (2, 2, 1, 2)
    assert (buckets.total, buckets.num_values) == (pytest.approx(112.6), 7)


def test_parts_that_are_taken_add_up_to_the_whole() -> None:
    chance = random.Random(1)
    whole, part, total = Histogram((0.1, 0.5)), Histogram((0.1, 0.5)), Histogram((0.1, 0.5))
    for _ in range(100):
        value = chance.random()
        whole.observe(value)
        part.observe(value)
        if chance.random() < 0.2:
            total.add(part.take())
    total.add(part.take())
    assert part.take().num_values == 0
    assert total.snapshot().counts == whole.snapshot().counts
    assert total.snapshot().total == pytest.approx(whole.snapshot().total)


def test_histograms_with_other_bounds_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="different bounds"):
        Histogram((1.0,)).add(Histogram((2.0,)).snapshot())


@pytest.mark.parametrize(
    "bounds",
    [BETWEEN_TOKENS_S, FIRST_TOKEN_S, LAG_S, QUEUE_S, REQUEST_S, REQUEST_TOKENS, STEP_S, STEP_TOKENS],
)
def test_bounds_ascend(bounds: tuple[float, ...]) -> None:
    assert list(bounds) == sorted(set(bounds)) and len(bounds) <= 30
