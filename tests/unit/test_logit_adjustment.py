"""What requests do to logits, against a reference written one token at a time."""

import math
import random

import numpy as np
import pytest
import torch

from stellarbyte.logit_adjustment import LogitAdjustment, adjust_logits
from stellarbyte.logprobs import token_logprobs

VOCABULARY = 70


def logits(rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2


def bitmask(allowed: set[int]) -> np.ndarray:
    words = np.zeros(-(-VOCABULARY // 32), np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words


def adjustment(tokens: list[int] | None = None, num_prompt: int = 0, **fields) -> LogitAdjustment:
    return LogitAdjustment(tokens=np.array(tokens or [], np.uint32), num_prompt=num_prompt, **fields)


def reference(row: torch.Tensor, a: LogitAdjustment, allowed: set[int] | None) -> list[float]:
    """Mask, ban, bias, then the penalties: repetition, presence, frequency."""
    out = [x if allowed is None or token in allowed else -math.inf for token, x in enumerate(row.tolist())]
    banned = [-math.inf if token in a.banned else x for token, x in enumerate(out)]
    out = banned if any(map(math.isfinite, banned)) else out
    for token, bias in a.bias:
        out[token] += bias
    everything, answer = a.tokens.tolist(), a.tokens.tolist()[a.num_prompt :]
    for token in range(len(out)):
        if token in everything:
            out[token] = out[token] / a.repetition_penalty if out[token] > 0 else out[token] * a.repetition_penalty
        if token in answer:
            out[token] -= a.presence_penalty + a.frequency_penalty * answer.count(token)
    return out


@pytest.mark.parametrize("seed", range(20))
def test_every_adjustment_equals_the_reference(seed: int) -> None:
    chance = random.Random(seed)
    allowed = set(chance.sample(range(VOCABULARY), 30)) if chance.random() < 0.5 else None
    a = adjustment(
        [chance.randrange(VOCABULARY) for _ in range(40)],
        num_prompt=15,
        allowed=None if allowed is None else bitmask(allowed),
        banned=tuple(chance.sample(range(VOCABULARY), 3)) if chance.random() < 0.5 else (),
        bias=((chance.randrange(VOCABULARY), 50.0), (VOCABULARY - 1, -100.0)) if chance.random() < 0.5 else (),
        repetition_penalty=chance.choice([1.0, 1.3, 0.7]),
        presence_penalty=chance.choice([0.0, 0.5, -1.0]),
        frequency_penalty=chance.choice([0.0, 0.25, -0.3]),
    )
    x = logits()
    torch.testing.assert_close(adjust_logits(x, [a])[0].tolist(), reference(x[0], a, allowed), rtol=1e-5, atol=1e-5)


def test_rows_without_an_adjustment_and_the_given_logits_stay_as_they_are() -> None:
    x = logits(3)
    before = x.clone()
    y = adjust_logits(x, [None, adjustment(bias=((5, 1.0),)), None])
    assert torch.equal(x, before) and torch.equal(y[[0, 2]], x[[0, 2]])
    assert y[1, 5] == x[1, 5] + 1
    assert adjust_logits(x, [None, None, None]) is x


def test_a_ban_gives_way_where_nothing_else_is_allowed() -> None:
    """A grammar that allows only the end wins over min_tokens, which bans it."""
    y = adjust_logits(logits(), [adjustment(allowed=bitmask({7}), banned=(7,))])
    assert y.isfinite().nonzero().tolist() == [[0, 7]]


def test_logprobs_are_of_the_raw_logits_and_the_likeliest_come_first() -> None:
    x = logits(3)
    found = token_logprobs(x, [1, 2, 3], [0, 2, 5])
    expected = x.double().log_softmax(dim=-1)
    for row, (token, count) in enumerate(zip([1, 2, 3], [0, 2, 5], strict=True)):
        assert found[row].logprob == pytest.approx(expected[row, token].item(), abs=1e-5)
        ranked = expected[row].argsort(descending=True)[:count].tolist()
        assert [token_id for token_id, _ in found[row].top] == ranked
        assert [value for _, value in found[row].top] == pytest.approx(expected[row, ranked].tolist(), abs=1e-5)
