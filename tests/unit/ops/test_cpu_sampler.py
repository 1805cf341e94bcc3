"""The compiled sampler against the reference, which has tests of its own."""

from typing import Any

import pytest
import torch

from stellarbyte.ops.cpu import sampler
from stellarbyte.sampling.sampler import NO_TOKEN, RowSampling, sample


def make_rows(number: int, **fields: Any) -> list[RowSampling]:
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "choice": 0}
    return [RowSampling(**defaults | fields | {"seed": 7 * i, "position": 1000 - i}) for i in range(number)]


@pytest.mark.parametrize("vocabulary", [1, 97, 256, 3000])
@pytest.mark.parametrize("sharpness", [0.1, 3.0])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 1e-6},
        {"temperature": 2.0},
        {"top_p": 0.7},
        {"top_p": 1e-6},
        {"min_p": 0.2},
        {"top_p": 0.999999, "temperature": 2.0},
        {"top_k": 5},
        {"top_k": 90, "top_p": 0.99},
        {"top_k": 20, "top_p": 0.6, "min_p": 0.05, "temperature": 0.8},
        {"choice": 3},
    ],
)
def test_every_kind_of_row_gets_the_references_token(fields: dict[str, Any], sharpness: float, vocabulary: int) -> None:
    logits_RV = sharpness * torch.randn(200, vocabulary, generator=torch.Generator().manual_seed(0))
    before = logits_RV.clone()
    rows = make_rows(200, **fields)
    assert sampler.sample(logits_RV, rows, num_threads=2) == sample(logits_RV, rows).tolist()
    assert torch.equal(logits_RV, before)


def test_rows_of_all_kinds_in_one_batch() -> None:
    rows = [
        make_rows(7, temperature=temperature, top_k=top_k, top_p=top_p)[i]
        for i, (temperature, top_k, top_p) in enumerate([(0, 0, 1), (1, 3, 1), (1, 0, 0.5), (0, 3, 0.5), (2, 9, 0.9)])
    ]
    logits_RV = torch.randn(5, 500, generator=torch.Generator().manual_seed(1))
    assert sampler.sample(logits_RV, rows, num_threads=3) == sample(logits_RV, rows).tolist()


def test_ties_and_forbidden_tokens() -> None:
    logits_RV = torch.full((64, 600), float("-inf"))
    logits_RV[:, [300, 400, 599]] = 1.0
    greedy = make_rows(64, temperature=0.0)
    assert sampler.sample(logits_RV, greedy, num_threads=2) == [300] * 64
    for top_p in (0.1, 0.9):
        random = make_rows(64, top_p=top_p)
        drawn = sampler.sample(logits_RV, random, num_threads=2)
        assert drawn == sample(logits_RV, random).tolist()
        assert set(drawn) == {300, 400, 599}


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {}, {"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.2}], ids=str)
def test_broken_rows_get_the_references_token_which_is_none(fields: dict[str, Any]) -> None:
    """The arithmetic is compiled as if there were no NaN; it must be seen all the same."""
    logits_RV = torch.randn(60, 3001, generator=torch.Generator().manual_seed(0))
    for i in range(0, 60, 4):
        logits_RV[i, 50 * i] = float("nan")
        logits_RV[i + 1] = -float("nan") if i % 8 else float("nan")
        logits_RV[i + 2] = float("-inf")
        logits_RV[i + 2, 3000] = float("inf") if i % 8 else float("-inf")
    rows = make_rows(60, **fields)
    tokens = sampler.sample(logits_RV, rows, num_threads=2)
    assert tokens == sample(logits_RV, rows).tolist()
    assert [token == NO_TOKEN for token in tokens] == [True, True, True, False] * 15
