"""A table of n-grams finds what a search of the whole sequence finds."""

import random
from array import array

import pytest

from stellarbyte_server.engine.drafts.ngrams import NgramTable


def latest(tokens: "array[int]", length: int) -> int | None:
    """The position after the last earlier occurrence of the newest n-gram, by search."""
    newest = tokens[-length:]
    for position in range(len(tokens) - 1, length - 1, -1):
        if tokens[position - length : position] == newest:
            return position
    return None


@pytest.mark.parametrize("cuts", [False, True])
@pytest.mark.parametrize("length", [2, 4])
def test_it_finds_the_latest_earlier_occurrence(length: int, cuts: bool) -> None:
    chance = random.Random(length)
    num_found = num_lost = 0
    for _ in range(60):
        vocabulary = chance.choice([2, 5, 50_000])
        tokens = array("I", [chance.randrange(vocabulary) for _ in range(chance.choice([1, 3, 30, 200]))])
        table = NgramTable(length, 4000)
        for _ in range(30):
            if cuts and chance.random() < 0.2 and len(tokens) > 8:
                del tokens[-chance.randint(1, 7) :]
            for _ in range(chance.choice([1, 1, 2, 6, 50])):
                tokens.append(tokens[-chance.randint(1, min(len(tokens), 9))] if chance.random() < 0.7 else 0)
            table.extend(tokens)
            found, expected = table.find(tokens), latest(tokens, length)
            if found is not None:
                assert tokens[found - length : found] == tokens[-length:]
            num_found += found is not None and found == expected
            num_lost += expected is not None and found != expected
    # Others may displace an n-gram; a cut may take its latest place, and with it the earlier ones.
    assert num_found > 700 and num_lost < (0.3 if cuts else 0.02) * num_found


def test_its_memory_does_not_grow_and_it_keeps_the_newest() -> None:
    tokens = array("I", [i % 30_000 for i in range(200_000)])
    table = NgramTable(3, len(tokens))
    size = table._positions.buffer_info()[1]
    table.extend(tokens)
    for _ in range(10):
        tokens.extend(range(40_000, 44_000))
        table.extend(tokens)
        assert table.find(tokens) in (None, len(tokens) - 4000)
    assert table._positions.buffer_info()[1] == size <= 1 << 14
    tokens.extend(range(7))
    table.extend(tokens)
    assert table.find(tokens) is None or tokens[table.find(tokens) - 3 : table.find(tokens)] == tokens[-3:]
