"""The oracle of long streams against the one that spells out every pair."""

import pytest
import torch

from tests.support.models import oracle
from tests.support.models.byte_transformer import make_model, random_tokens

W = 12


@pytest.mark.parametrize("rows", [1, 5, 256])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("window", [1, W, None])
@pytest.mark.parametrize("use_xpos", [True, False], ids=["xpos", "rope"])
def test_bands_give_what_all_pairs_give(use_xpos: bool, window: int | None, sinks: int, rows: int) -> None:
    config = make_model(sliding_window=window, sink_tokens=sinks, use_xpos=use_xpos, attention_softcap=5.0).config
    q, k, v = (torch.randn(4 * W + 3, 4, 16, dtype=torch.float64) for _ in range(3))
    for sink_H in (None, torch.randn(4, dtype=torch.float64)):
        banded = oracle._attend_in_bands(config, 0, q, k, v, sink_H, rows)
        torch.testing.assert_close(banded, oracle._attend(config, 0, q, k, v, sink_H), rtol=0, atol=1e-12)


def test_positions_may_be_chosen() -> None:
    model = make_model(sliding_window=W, sink_tokens=4)
    tokens = random_tokens(4 * W + 3)
    chosen = oracle.banded_logprobs(model.state_dict(), model.config, tokens, [3, 4 * W])
    everywhere = oracle.logprobs(model.state_dict(), model.config, tokens)
    torch.testing.assert_close(chosen, everywhere[[3, 4 * W]], rtol=0, atol=1e-12)
