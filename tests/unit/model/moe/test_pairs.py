"""Rows to pairs and back against a loop over places in float64; gradients against finite differences."""

import pytest
import torch

from stellarbyte.model.moe.pairs import copied_to_pairs, weighted_sums

NUM_TOKENS, HIDDEN = 5, 4


def random_order(most: int, num_pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The place of each pair in any order, and the pair of each place; places without a pair have numbers from
    `num_pairs` on."""
    order = torch.randperm(NUM_TOKENS * most, generator=torch.Generator().manual_seed(most))
    return order[:num_pairs], order.argsort().view(NUM_TOKENS, most)


CASES = [(1, 5), (2, 10), (3, 15), (3, 11), (2, 1), (2, 0)]  # most choices of a token, pairs


@pytest.mark.parametrize(("most", "num_pairs"), CASES)
def test_rows_are_those_of_a_loop(most: int, num_pairs: int) -> None:
    torch.manual_seed(0)
    place_N, row_TK = random_order(most, num_pairs)
    x_TC, gates_TK = torch.randn(NUM_TOKENS, HIDDEN).double(), torch.randn(NUM_TOKENS, most).double()
    rows_NC = torch.randn(num_pairs, HIDDEN).double()
    expected_NC, expected_TC = torch.zeros_like(rows_NC), torch.zeros_like(x_TC)
    for row, place in enumerate(place_N.tolist()):
        t, k = divmod(place, most)
        expected_NC[row] = x_TC[t]
        expected_TC[t] += gates_TK[t, k] * rows_NC[row]
    assert torch.equal(copied_to_pairs(x_TC, place_N // most, row_TK), expected_NC)
    torch.testing.assert_close(weighted_sums(rows_NC, gates_TK, place_N, row_TK), expected_TC)


@pytest.mark.parametrize(("most", "num_pairs"), CASES[:-1])
def test_gradients_are_those_of_finite_differences(most: int, num_pairs: int) -> None:
    torch.manual_seed(0)
    place_N, row_TK = random_order(most, num_pairs)
    x_TC = torch.randn(NUM_TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: copied_to_pairs(x, place_N // most, row_TK), (x_TC,))
    rows_NC = torch.randn(num_pairs, HIDDEN, dtype=torch.float64, requires_grad=True)
    gates_TK = torch.randn(NUM_TOKENS, most, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *of: weighted_sums(*of, place_N, row_TK), (rows_NC, gates_TK))


@torch.no_grad()
def test_bfloat16_rows_are_summed_in_float32_and_rounded_once() -> None:
    """Eight rows a token: sums in bfloat16 would round seven times. The same of the gradients."""
    torch.manual_seed(0)
    num_tokens, most = 50, 8
    place_N = torch.randperm(num_tokens * most)
    row_TK = place_N.argsort().view(num_tokens, most)
    rows_NC, gates_TK = torch.randn(num_tokens * most, 32).bfloat16(), torch.rand(num_tokens, most)
    x_TC = torch.zeros(num_tokens, 32, dtype=torch.bfloat16, requires_grad=True)
    with torch.enable_grad():
        copied_to_pairs(x_TC, place_N // most, row_TK).backward(rows_NC)
    placed_TKC = rows_NC.double()[row_TK]
    for found, factors_TK in (
        (weighted_sums(rows_NC, gates_TK, place_N, row_TK), gates_TK),
        (x_TC.grad, torch.ones_like(gates_TK)),
    ):
        expected_TC = (factors_TK.double()[:, :, None] * placed_TKC).sum(dim=1).bfloat16()
        assert found is not None and found.dtype == torch.bfloat16
        assert (found == expected_TC).double().mean() > 0.99


def test_an_empty_place_adds_nothing_even_beside_rows_without_numbers() -> None:
    rows_NC, gates_TK = torch.full((1, HIDDEN), torch.nan), torch.ones(2, 1)
    sums_TC = weighted_sums(rows_NC, gates_TK, torch.tensor([1]), torch.tensor([[1], [0]]))
    assert (sums_TC[0] == 0).all() and sums_TC[1].isnan().all()
