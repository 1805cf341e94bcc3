"""Samples: bounded by bytes, the same in every order, and from everywhere alike."""

import random
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from stellarbyte.train.config.sources import Source
from stellarbyte.train.data.files import files_of
from stellarbyte.train.tokenizer.sampler import PART_CHARACTERS, parts, sample

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), max_size=40, unique=True)


@given(TEXTS, st.integers(1, 600), st.randoms())
def test_a_sample_is_bounded_and_does_not_depend_on_the_order(texts: list[str], limit: int, rng: random.Random) -> None:
    encoded = [text.encode() for text in texts]
    chosen = sample(encoded, limit)
    total = sum(map(len, encoded))
    assert sum(len(text.encode()) for text in chosen) <= limit
    assert set(chosen) <= set(texts)
    if total <= limit:
        assert sorted(chosen) == sorted(texts)
    else:  # no room is wasted for which there was a text
        assert sum(len(text.encode()) for text in chosen) > limit - max(map(len, encoded))
    shuffled = rng.sample(encoded, len(encoded))
    assert sample(shuffled, limit) == chosen


def test_texts_of_every_place_are_as_likely() -> None:
    """Of 20,000 texts of one length a tenth: within 6 standard deviations in each quarter."""
    texts = [f"{number:07}".encode() for number in range(20_000)]
    chosen = [int(text) for text in sample(texts, 14_000)]
    assert len(chosen) == 2000
    for quarter in range(4):
        found = sum(number // 5000 == quarter for number in chosen)
        assert abs(found - 500) < 6 * (5000 * 0.1 * 0.9) ** 0.5


def test_what_is_reported_on_is_not_learned_from(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(1000)] + ["é" * (2 * PART_CHARACTERS + 5)]
    (tmp_path / "a.txt").write_text("|".join(texts))
    files = files_of([Source(files=[str(tmp_path / "a.txt")], separator="|", kind="words")])
    reported, learned = (list(parts(files, of_report=of_report)) for of_report in (True, False))
    assert {kind for kind, _ in reported + learned} == {"words"}
    assert not {text for _, text in reported} & {text for _, text in learned}
    assert sum(len(text.decode()) for _, text in reported + learned) == sum(map(len, texts))
    assert max(len(text.decode()) for _, text in reported + learned) == PART_CHARACTERS
    assert 10 < len(reported) < 70
