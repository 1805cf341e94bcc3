"""Token choice: the distribution it draws from, and that a row depends on nothing but itself."""

import pytest
import torch

from stellarbyte.sampling.sampler import NO_TOKEN, RowSampling, gumbel_noise, keep_top_k, keep_top_p, sample

VOCABULARY = 64


def row(position: int = 0, seed: int = 0, choice: int = 0, **changes) -> RowSampling:
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | changes
    return RowSampling(seed=seed, choice=choice, position=position, **settings)


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def reference_distribution(x: torch.Tensor, r: RowSampling) -> torch.Tensor:
    """Temperature, then top_k, top_p, min_p, one token at a time."""
    p = (x.double() / r.temperature).softmax(dim=-1)
    ranked = sorted(range(len(p)), key=lambda i: -p[i])
    kept = ranked[: r.top_k] if r.top_k else ranked
    total, nucleus = sum(p[i] for i in kept), []
    for i in kept:
        if sum(p[j] for j in nucleus) / total >= r.top_p and nucleus:
            break
        nucleus.append(i)
    nucleus = [i for i in nucleus if p[i] >= r.min_p * p[ranked[0]]]
    out = torch.zeros(len(p), dtype=torch.float64)
    out[nucleus] = p[nucleus]
    return out / out.sum()


SETTINGS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_tokens_follow_the_distribution(changes) -> None:
    """Chi-squared over 20,000 draws against a reference written for clarity; its 99.99% quantile is the bound."""
    draws = 20_000
    x = logits(1)
    counts = torch.zeros(VOCABULARY, dtype=torch.float64)
    for start in range(0, draws, 1000):
        rows = [row(position=start + i, **changes) for i in range(1000)]
        counts += torch.bincount(sample(x.expand(1000, -1), rows), minlength=VOCABULARY)
    expected = reference_distribution(x[0], rows[0]) * draws
    assert counts[expected == 0].sum() == 0
    large = expected >= 5
    statistic = ((counts - expected)[large] ** 2 / expected[large]).sum().item()
    freedom = int(large.sum()) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 10


def test_a_seeded_row_does_not_depend_on_its_neighbours() -> None:
    x = logits(32)
    changes = [
        {"temperature": 0.0},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.2},
        {"temperature": 0.7, "top_p": 0.9},
        {},
        {"temperature": 5.0},
        {"top_k": 1},
    ]
    rows = [row(position=i, seed=2**63 + i, **changes[i % 8]) for i in range(32)]
    together = sample(x, rows)
    for i in range(32):
        assert sample(x[i : i + 1], rows[i : i + 1])[0] == together[i]


def test_noise_differs_by_seed_choice_and_position_and_is_uncorrelated() -> None:
    variants = [row(), row(position=1), row(seed=1), row(choice=1), row(seed=1 << 40), row(position=1, choice=1)]
    noise = gumbel_noise(variants, 20_000, torch.device("cpu"))
    assert noise.isfinite().all()
    correlation = torch.corrcoef(noise) - torch.eye(len(variants))
    assert correlation.abs().max() < 0.04
    assert abs(noise.mean().item() - 0.5772) < 0.02 and abs(noise.var().item() - 1.6449) < 0.05


def test_temperature_zero_takes_the_lowest_id_on_ties() -> None:
    x = torch.zeros(1, VOCABULARY)
    x[0, [50, 7, 20]] = 3.0
    assert sample(x, [row(temperature=0.0)]).tolist() == [7]


@pytest.mark.parametrize("temperature", [1e-8, 1e-3])
def test_tiny_temperatures_are_greedy_not_nan(temperature: float) -> None:
    x = logits(1) * 1e4
    assert sample(x, [row(temperature=temperature)])[0] == x[0].argmax()


def test_edges_of_truncation() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    for top_k, kept in [(0, 4), (1, 1), (2, 2), (4, 4), (1000, 4)]:
        y = x.clone()
        keep_top_k(y, [top_k])
        assert y.isfinite().sum() == kept
    for top_p, kept in [(1.0, 4), (1e-9, 1), (0.7, 2), (0.6, 1)]:
        y = x.clone()
        keep_top_p(y, torch.tensor([[top_p]]))
        assert y.isfinite().sum() == kept


def test_ties_with_the_last_token_that_stays_stay() -> None:
    x = torch.tensor([[1.0, 2.0, 1.0, 1.0, -3.0]])  # 0.17, 0.47, 0.17, 0.17
    for top_p, kept in [(0.4, [1]), (0.55, [0, 1, 2, 3]), (0.99, [0, 1, 2, 3])]:
        y = x.clone()
        keep_top_p(y, torch.tensor([[top_p]]))
        assert y[0].isfinite().nonzero().flatten().tolist() == kept
    keep_top_k(x, [2])
    assert x[0].isfinite().nonzero().flatten().tolist() == [0, 1, 2, 3]


BROKEN = {
    "NaN": [float("nan")] * VOCABULARY,
    "one NaN": [0.0] * (VOCABULARY - 1) + [float("nan")],
    "NaN first": [float("nan")] + [0.0] * (VOCABULARY - 1),
    "negative NaN": [-float("nan")] * VOCABULARY,
    "NaN among forbidden": [float("-inf")] * (VOCABULARY - 1) + [float("nan")],
    "inf": [0.0, float("inf")] + [0.0] * (VOCABULARY - 2),
    "nothing allowed": [float("-inf")] * VOCABULARY,
}


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, *SETTINGS], ids=str)
def test_a_row_without_a_finite_largest_logit_gets_no_token_and_the_others_theirs(changes) -> None:
    x = logits(2 * len(BROKEN))
    rows = [row(position=i, **changes) for i in range(len(x))]
    expected = sample(x, rows)
    x[1::2] = torch.tensor(list(BROKEN.values()))
    tokens = sample(x, rows)
    assert tokens[1::2].tolist() == [NO_TOKEN] * len(BROKEN)
    assert torch.equal(tokens[0::2], expected[0::2])
