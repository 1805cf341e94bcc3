"""Log-probabilities and ranks of tokens, against numpy in float64."""

import numpy as np
import torch

from stellarbyte.sampling.logprobs import token_logprobs, token_ranks


def test_logprobs_and_ranks_are_those_of_the_sorted_distribution() -> None:
    logits_RV = torch.randn(20, 97, generator=torch.Generator().manual_seed(0)) * 4
    tokens = torch.randint(97, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    logits = logits_RV.double().numpy()
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ranks = token_ranks(logits_RV, tokens)
    for row, token, rank, found in zip(
        expected, tokens, ranks, token_logprobs(logits_RV, tokens, [5] * 20), strict=True
    ):
        order = np.argsort(-row)
        assert order[rank - 1] == token
        assert abs(found.logprob - row[token]) < 1e-5
        assert [top for top, _ in found.top] == order[:5].tolist()


def test_equal_logits_share_a_place() -> None:
    assert token_ranks(torch.tensor([[1.0, 3.0, 3.0, 2.0]] * 4), [0, 1, 2, 3]) == [4, 1, 1, 3]
