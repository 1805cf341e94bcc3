"""Log-probabilities of a prompt with few rows of logits in memory."""

import pytest
import torch

from stellarbyte_server.engine.run.outputs import prompt_logprobs


class Head:
    """`rows`: of each call."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def head(self, hidden_RC: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(hidden_RC))
        return 2 * hidden_RC


@pytest.mark.parametrize(("rows_at_once", "rows"), [(None, [7]), (3, [3, 3, 1]), (7, [7]), (20, [7])])
def test_logits_in_slices_give_the_same_log_probabilities(rows_at_once: int | None, rows: list[int]) -> None:
    chunk_TC = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    following = [3, 1, 4, 1, 5, 9, 2]
    head = Head()
    found = prompt_logprobs(head, chunk_TC, following, 2, rows_at_once)
    assert head.rows == rows
    expected_TV = (2 * chunk_TC[:7]).log_softmax(dim=-1)
    for told, row_V, token in zip(found, expected_TV, following, strict=True):
        assert told.token_id == token and abs(told.logprob - row_V[token]) <= 1e-5
        assert told.rank == 1 + int((row_V > row_V[token]).sum())
        assert [each for each, _ in told.top] == row_V.topk(2).indices.tolist()
    assert prompt_logprobs(head, chunk_TC, [], 2, rows_at_once) == []
